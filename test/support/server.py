"""A real `sglang-er serve` process for tests: start, wait until healthy, talk to it, stop it."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from sglang_er.rollout.launcher import choose_port, start_timeout

REQUEST_TIMEOUT_S = 600.0


@dataclass
class Server:
    """A running server. All methods raise AssertionError with the server's reply if it refuses."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        return requests.request(method, self.url + path, timeout=REQUEST_TIMEOUT_S, **kwargs)

    def post(self, path: str, body: Any = None) -> Any:
        reply = self.request("POST", path, json={} if body is None else body)
        assert reply.status_code == 200, f"POST {path}: {reply.status_code} {reply.text[:500]}"
        return reply.json() if reply.content else None

    def get(self, path: str) -> Any:
        reply = self.request("GET", path)
        assert reply.status_code == 200, f"GET {path}: {reply.status_code} {reply.text[:500]}"
        return reply.json()

    def generate(
        self, prompt: str | Sequence[int], sampling: Mapping[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """POST /generate for one prompt (text or token ids); `fields` are top-level request fields."""
        key = "text" if isinstance(prompt, str) else "input_ids"
        value = prompt if isinstance(prompt, str) else list(prompt)
        reply: dict[str, Any] = self.post("/generate", {key: value, "sampling_params": dict(sampling or {}), **fields})
        return reply

    def generate_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        concurrency: int,
        **fields: Any,
    ) -> list[dict[str, Any]]:
        """One request per prompt, `concurrency` at a time, replies in prompt order."""
        per_prompt = [sampling] * len(prompts) if isinstance(sampling, Mapping) else list(sampling)
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(self.generate, p, s, **fields) for p, s in zip(prompts, per_prompt, strict=True)]
            return [future.result() for future in futures]

    def state(self) -> dict[str, Any]:
        """GET /er/state of the first engine."""
        engine: dict[str, Any] = self.get("/er/state")["engines"][0]
        return engine

    def set_policy(self, **changes: Any) -> None:
        """Switch the policy; waits for the server to become idle (the last reply may precede its bookkeeping)."""
        deadline = time.monotonic() + 30
        while True:
            reply = self.request("POST", "/er/policy", json=changes)
            if reply.status_code != 409 or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        assert reply.status_code == 200, f"/er/policy {changes}: {reply.status_code} {reply.text[:500]}"

    def fixed(self, gamma: int) -> None:
        self.set_policy(policy="fixed", gamma=gamma)

    def cycle(self, schedule: Sequence[int] = (0, 3, 1, 7, 5, 2)) -> None:
        """A draft length that changes every step, plain decode included."""
        self.set_policy(policy="cycle", gamma_schedule=list(schedule))

    def flush_cache(self) -> None:
        deadline = time.monotonic() + 30
        while (reply := self.request("POST", "/flush_cache")).status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert reply.status_code == 200, reply.text

    def alive(self) -> bool:
        return self.process.poll() is None and self.request("GET", "/health").status_code == 200

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        # SGLang prints all its arguments in one line of many kilobytes.
        return "\n".join(line[:300] for line in self.log_text().splitlines()[-lines:])


def serve_command(model: Path, port: int, *flags: str) -> list[str]:
    return [
        str(Path(sys.executable).parent / "sglang-er"),
        *("serve", "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *flags,
    ]


def framework_command(model: Path, port: int, *flags: str) -> list[str]:
    """The launch of an RL framework (support/framework_launch.py); test/ must be on PYTHONPATH."""
    ours = serve_command(model, port, *flags)
    return [sys.executable, "-m", "support.framework_launch", *ours[ours.index("--model-path") :]]


def areal_command(model: Path, port: int, *flags: str) -> list[str]:
    """The command that AReaL builds, SGLang's own entry point in place of AReaL's copy (support/areal_launch.py)."""
    command = framework_command(model, port, *flags)
    return [command[0], "-m", "support.areal_launch", *command[3:]]


def _environment() -> dict[str, str]:
    """Of a server: this process's, without what is set for the tests' own kernels (conftest.py)."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@contextmanager
def running_server(
    model: Path,
    log: Path,
    *flags: str,
    env: Mapping[str, str] | None = None,
    command: Callable[..., list[str]] = serve_command,
) -> Iterator[Server]:
    """Start a server by `command` on a free port; stop the whole process group at the end."""
    port = choose_port(None)
    arguments = command(model, port, *flags)
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_environment(), **(env or {})},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_healthy(server, start_timeout(flags))
        yield server
    finally:
        _stop(process)


def _wait_until_healthy(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended with {server.process.returncode}:\n{server.log_tail()}")
        try:
            if requests.get(server.url + "/health_generate", timeout=30).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the server was not healthy after {seconds:.0f} s:\n{server.log_tail()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue
        if sent == signal.SIGTERM:
            # The leader is gone; whatever it left behind goes with the group.
            continue
