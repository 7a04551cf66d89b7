"""Requests to a server, alone and many at once, and what tells that it is idle."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import requests

from sglang_er.rollout.client import REQUEST_TIMEOUT_S, Client
from sglang_er.rollout.conformance import bodies
from sglang_er.rollout.conformance.check import Broken, expect
from sglang_er.rollout.conformance.replies import Reply
from sglang_er.rollout.errors import RolloutError

IDLE_TIMEOUT_S = 30.0
MOST_AT_ONCE = 128
# Ids that are ordinary tokens in every vocabulary.
TOKEN_IDS = 250


@dataclass
class Running:
    """A request in flight. `begun` is set once some of its tokens have arrived."""

    reply: Future[Reply]
    begun: threading.Event = field(default_factory=threading.Event)


class Connection:
    """A status that was not expected is a Broken promise, no answer a RolloutError."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = Client(url)
        self._pool = ThreadPoolExecutor(MOST_AT_ONCE)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def send(self, method: str, path: str, body: Any = None) -> requests.Response:
        """Any status is an answer. Raises RolloutError where there is none."""
        return self.client.send(method, path, body)

    def get(self, path: str) -> Any:
        return self._json("GET", path, None, "contract")

    def post(self, path: str, body: Any = None, promise: str = "contract") -> Any:
        """The decoded reply; raises Broken of `promise` if the status is not 200."""
        return self._json("POST", path, {} if body is None else body, promise)

    def _json(self, method: str, path: str, body: Any, promise: str) -> Any:
        reply = self.send(method, path, body)
        expect(reply.status_code == 200, promise, f"{method} {path}: {reply.status_code} {reply.text}")
        try:
            return reply.json() if reply.content else None
        except ValueError:
            return reply.text

    # Requests

    def prompt(self, seed: int, length: int = 12) -> list[int]:
        """Token ids that no other seed begins with."""
        rng = random.Random(f"{seed} {length}")
        return [rng.randrange(5, TOKEN_IDS) for _ in range(length)]

    def generate(self, body: Mapping[str, Any]) -> Reply:
        reply: Reply = self.post("/generate", body)
        return reply

    def start(self, body: Mapping[str, Any]) -> Future[Reply]:
        """The request in a thread of its own."""
        return self._pool.submit(self.generate, body)

    def call(self, path: str, body: Any) -> Future[Any]:
        """A POST in a thread of its own: the server answers once this program has done its part."""
        return self._pool.submit(self.post, path, body)

    def settled(self, future: Future[Any], seconds: float) -> bool:
        """Whether the answer is there within `seconds`."""
        return bool(wait([future], timeout=seconds).done)

    def begin(self, body: Mapping[str, Any]) -> Running:
        """The request as a stream, so that it can be seen to run."""
        running = Running(Future())

        def read() -> None:
            chunk: Reply = {}
            try:
                for chunk in self.stream(body):
                    if len(chunk.get("output_ids") or []) > 1:
                        running.begun.set()
                running.reply.set_result(chunk)
            except BaseException as error:
                running.reply.set_exception(error)
            finally:
                running.begun.set()

        self._pool.submit(read)
        return running

    def stream(self, body: Mapping[str, Any]) -> Iterator[Any]:
        """The chunks of a streamed reply; Broken unless it ends with `[DONE]`."""
        done = False
        with requests.post(
            f"{self.url}/generate", json={**body, "stream": True}, stream=True, timeout=REQUEST_TIMEOUT_S
        ) as reply:
            expect(reply.status_code == 200, "contract", f"streamed /generate: {reply.status_code}")
            for line in reply.iter_lines():
                if line == b"data: [DONE]":
                    done = True
                elif line.startswith(b"data: "):
                    yield json.loads(line[6:])
        expect(done, "contract", "the stream ended without [DONE]")

    def all(self, wanted: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """All at once; the replies in order."""
        return [future.result() for future in [self.start(body) for body in wanted]]

    def score(self, prompt: Sequence[int], output: Sequence[int]) -> tuple[list[float], list[float]]:
        """Logprobs of `output` after `prompt`, and of the best token at each place, from a pass that generates nothing.

        SGLang 0.5.21 scores at temperature 1 whatever the request says.
        """
        body = bodies.scoring([*prompt, *output], len(prompt) - 1) | {"top_logprobs_num": 1}
        meta = self.generate(body)["meta_info"]
        own, best = (meta[name][-len(output) :] for name in ("input_token_logprobs", "input_top_logprobs"))
        return [float(entry[0]) for entry in own], [float(top[0][0]) for top in best]

    # State

    def loads(self) -> list[dict[str, int]]:
        """Per engine, what slime waits for after an abort."""
        found: list[dict[str, int]] = self.get("/v1/loads?include=core")["loads"]
        return found

    def wait_idle(self, promise: str = "contract") -> None:
        """Until nothing runs or waits."""
        self._until(lambda: not any(sum(_requests(load)) for load in self.loads()), promise, "the server stays busy")

    def wait_running(self, count: int) -> None:
        self._until(lambda: sum(_requests(load)[0] for load in self.loads()) >= count, "contract", "nothing runs")

    def _until(self, ready: Callable[[], bool], promise: str, what: str) -> None:
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while not ready():
            expect(time.monotonic() < deadline, promise, f"{what} for {IDLE_TIMEOUT_S:.0f} s: {self.loads()}")
            time.sleep(0.05)

    def flush(self) -> None:
        """Empty the prefix cache, once the server is idle."""
        try:
            self.client.flush_cache()
        except RolloutError as error:
            raise Broken("L7", str(error)) from error

    def flush_paused(self) -> None:
        """The same during a pause, in which nothing becomes idle by waiting."""
        for _ in range(20):
            if (reply := self.send("GET", "/flush_cache")).status_code == 200:
                return
            time.sleep(0.25)
        raise Broken("L7", f"/flush_cache while paused: {reply.status_code} {reply.text}")

    def survives(self, action: Callable[[], Any], promise: str, otherwise: str) -> Any:
        """What `action` returns; Broken if the server no longer answers then."""
        try:
            found = action()
        except RolloutError:
            found = None
        expect(self.client.healthy(), promise, otherwise)
        return found

    def version(self) -> str:
        return str(self.get("/model_info")["weight_version"])


def _requests(load: Mapping[str, int]) -> tuple[int, int]:
    return load["num_running_reqs"], load["num_waiting_reqs"]
