"""A server under examination: requests to it, its weights, and the way back to how it was found."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from sglang_er.rollout.bench import switchable
from sglang_er.rollout.client import REQUEST_TIMEOUT_S, Client
from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Broken, NotHere, expect
from sglang_er.rollout.conformance.replies import Reply
from sglang_er.rollout.conformance.sender import Sender
from sglang_er.rollout.errors import RolloutError

IDLE_TIMEOUT_S = 30.0
MOST_AT_ONCE = 128
# A draft length that changes every step, plain decode included: every way in which a step can end is taken.
SCHEDULE = (0, 3, 1, 7, 5, 2)
# The draft length while acceptance is measured.
GAMMA = 5
# Ids that are ordinary tokens in every vocabulary.
TOKEN_IDS = 250
LONG = 800
MEASURED_PROMPTS, MEASURED_TOKENS = 6, 48


@dataclass(frozen=True)
class Options:
    """`weights`: another checkpoint of the server's architecture, and the server's own; both as the server finds them.

    `sender`: what trainers send tensors with, or why it cannot be had. `destructive`: end the server if it breaks.
    """

    weights: Sequence[str] = ()
    destructive: bool = False
    sender: Sender | None = None
    no_sender: str = "no sender was given"


@dataclass(frozen=True)
class Measured:
    """Greedy answers one at a time and the accept length while they were made (None: the server does not speculate)."""

    ids: list[list[int]]
    accept_length: float | None


@dataclass
class Running:
    """A request in flight. `begun` is set once some of its tokens have arrived."""

    reply: Future[Reply]
    begun: threading.Event = field(default_factory=threading.Event)


class Session:
    """All that the checks share. Every failure of the server's own is a Broken or a RolloutError."""

    def __init__(self, url: str, options: Options | None = None) -> None:
        self.url = url
        self.options = options or Options()
        self.client = Client(url)
        self.info: dict[str, Any] = self.get("/server_info")
        self.model: dict[str, Any] = self.get("/model_info")
        state = self.send("GET", "/er/state")
        self.ours = state.status_code == 200
        self._policy = switchable(state.json()["engines"][0]) if self.ours else {}
        given = self.options.weights
        self.own_weights = given[1] if len(given) > 1 else str(self.model["model_path"])
        self._version = str(self.model["weight_version"])
        self._pool = ThreadPoolExecutor(MOST_AT_ONCE)
        self._measured: dict[str, Measured] = {}
        self._changed = self._paused = False

    # The server

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

    @property
    def tolerance(self) -> float:
        """Between logprobs of one token computed by decoding and by scoring, in nats."""
        return 2e-3 if "float32" in str(self.info.get("dtype")) else 0.3

    @property
    def long(self) -> int:
        """Tokens of a response that outlasts a few calls; the prompt of `prompt()` fits before it."""
        context = self.info.get("context_length") or self.info.get("max_req_input_len") or LONG + 64
        return min(LONG, int(context) - 64)

    def gamma_max(self) -> int:
        """The longest draft: tokens a step may commit beyond one."""
        return int(self.info.get("speculative_num_draft_tokens") or 1) - 1

    def speculates(self) -> bool:
        return bool(self.info.get("speculative_algorithm"))

    def counters(self) -> Mapping[str, Any] | None:
        """Step counters of the first engine; None for a server that is not ours."""
        steps: Mapping[str, Any] | None = self.client.state()["steps"] if self.ours else None
        return steps

    # Policy: only a server of ours can be told how to draft

    def draft(self, gamma: int | None = None) -> None:
        """Drafts of `gamma` tokens, 0 for none; None: a length that changes every step."""
        if not self.ours:
            return
        most = self.gamma_max()
        schedule = [min(length, most) for length in SCHEDULE]
        chosen = (
            {"policy": "cycle", "gamma_schedule": schedule} if gamma is None else {"policy": "fixed", "gamma": gamma}
        )
        self.client.set_policy(chosen)

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

    def stream(self, body: Mapping[str, Any]) -> Any:
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

    @contextmanager
    def paused(self, **mode: str):  # type: ignore[no-untyped-def]
        """Between pause_generation and continue_generation, as every trainer does it."""
        self._paused = True
        self.post("/pause_generation", mode)
        yield
        self.resume()

    def resume(self) -> None:
        self.post("/continue_generation")
        self._paused = False

    # Weights

    def other_weights(self) -> str:
        """The other checkpoint. Raises NotHere without one."""
        if not self.options.weights:
            raise NotHere("changes the weights: name another checkpoint of this architecture with --weights DIR")
        return self.options.weights[0]

    def load(self, path: str, version: str, **fields: Any) -> None:
        """update_weights_from_disk, as slime sends it."""
        self.touch()
        body = {"model_path": path, "weight_version": version, **fields}
        reply = self.post("/update_weights_from_disk", body)
        expect(reply.get("success") is True, "contract", f"/update_weights_from_disk: {reply}")

    def touch(self) -> None:
        """The weights are no longer the server's own: `restore` loads them. Measures them first, if nobody has."""
        self.measure_own()
        self._changed = True

    def measure_own(self) -> Measured:
        """The server's own weights as they were before any check changed them."""
        if self.own_weights not in self._measured and not self._changed:
            self._measured[self.own_weights] = self.measure()
        return self._measured[self.own_weights]

    def measure(self) -> Measured:
        """The weights loaded now; requests one at a time, so that nothing but the weights decides the accepts."""
        self.wait_idle()
        self.draft(min(GAMMA, self.gamma_max()))
        self.flush()
        got = [self.generate(bodies.greedy(self.prompt(900 + i, 20), MEASURED_TOKENS)) for i in range(MEASURED_PROMPTS)]
        self.draft()
        return Measured([replies.output_ids(reply) for reply in got], replies.accept_length(got))

    # The way back

    def restore(self) -> None:
        """Running, idle, on its own weights and version, with its own policy. Raises RolloutError if it cannot be."""
        try:
            if self._paused:
                self.resume()
            self.send("POST", "/abort_request", {"abort_all": True})
            self.wait_idle()
            if self._changed:
                self.send("POST", "/end_weight_update", {})  # 400 where no session is open
                self.load(self.own_weights, self._version)
                self._changed = False
            if self.ours:
                self.client.set_policy(self._policy)
        except Broken as error:
            raise RolloutError(f"the server could not be brought back to how it was found: {error}") from error

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def local_weights(self, path: str) -> Path:
        """A checkpoint's files, for tensors that this program sends. Raises NotHere where they are elsewhere."""
        if not (folder := Path(path)).is_dir():
            raise NotHere(f"{path} is not a folder on this machine: its tensors cannot be sent")
        return folder

    def sender(self) -> Sender:
        """What trainers send tensors with. Raises NotHere where it cannot be had or the server is elsewhere."""
        if self.options.sender is None:
            raise NotHere(self.options.no_sender)
        if "://127.0.0.1" not in self.url and "://localhost" not in self.url:
            raise NotHere("tensors travel through this machine's shared memory: use --url http://127.0.0.1:PORT")
        return self.options.sender


def _requests(load: Mapping[str, int]) -> tuple[int, int]:
    return load["num_running_reqs"], load["num_waiting_reqs"]
