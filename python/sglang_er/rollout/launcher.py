"""Starts `sglang-er serve` as a process of its own, waits until it answers, and takes all of it down again."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sglang_er.rollout import machine
from sglang_er.rollout.client import Client
from sglang_er.rollout.errors import RolloutError

START_TIMEOUT_S, GPU_START_TIMEOUT_S = 300.0, 900.0
STOP_TIMEOUT_S = 10.0
HOST = "127.0.0.1"
# Below those that the kernel gives to outgoing connections: one of them could take the port before the server does.
PORTS = range(20_000, 32_000)


@dataclass(frozen=True)
class ServerProcess:
    """A started server: its process, its log, and a client for it."""

    process: subprocess.Popen[bytes]
    log: Path
    client: Client

    def cpu_seconds(self) -> float:
        """Processor time of the server, all of its processes together."""
        return machine.session_cpu_seconds(self.process.pid)

    def check_alive(self) -> None:
        """Raises RolloutError with the log's last line if the server has ended."""
        code = self.process.poll()
        if code is not None:
            raise RolloutError(f"the server ended with exit code {code}: {last_line(self.log)} (log: {self.log})")


def serve_command(model: Path, port: int, flags: Sequence[str] = ()) -> list[str]:
    """The command line; runs the same interpreter and environment as this process."""
    program = [sys.executable, "-m", "sglang_er.cli.main"]
    return [*program, "serve", "--model-path", str(model), "--host", HOST, "--port", str(port), *flags]


def choose_port(wanted: int | None) -> int:
    """`wanted` if it is free, else RolloutError; without a wish, any free port."""
    if wanted:
        try:
            return _free(wanted)
        except (OSError, OverflowError) as error:
            raise RolloutError(f"port {wanted} cannot be used ({error}): choose another --port") from None
    for port in random.sample(PORTS, 100):
        with suppress(OSError):
            return _free(port)
    raise RolloutError(f"no free port found in {PORTS.start}..{PORTS.stop - 1}: choose one with --port")


def _free(port: int) -> int:
    """`port`. Raises OSError if it is taken, OverflowError if it is none."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
    return port


def last_line(log: Path) -> str:
    """The line of the log that says most about its end: the last error, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    # After its cause, SGLang's log goes on with a child that was killed and with resource trackers.
    errors = [line for line in lines if re.match(r"(\[.*\] )?(\w+\.)*\w*(Error|Exception|Killed): |sglang-er: ", line)]
    return (errors or lines or ["its log is empty"])[-1][:300]


@contextmanager
def running_server(
    model: Path, port: int, log: Path, flags: Sequence[str] = (), on_wait: Callable[[float], None] | None = None
) -> Iterator[ServerProcess]:
    """A healthy server, stopped however the block ends. `on_wait(seconds)` is called once a second until it is."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches this process only, which then stops the whole group.
        process = subprocess.Popen(
            serve_command(model, port, flags), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        server = ServerProcess(process, log, Client(f"http://{HOST}:{port}"))
        _wait_until_healthy(server, start_timeout(flags), on_wait)
        yield server
    except RolloutError:
        # A request that failed because the server is gone should name the cause, not the symptom.
        if _ended(process):
            ServerProcess(process, log, server.client).check_alive()
        raise
    finally:
        _stop(process)


def start_timeout(flags: Sequence[str]) -> float:
    """Seconds that a server with these flags may take to answer: on a GPU it compiles kernels and records graphs."""
    return GPU_START_TIMEOUT_S if "cuda" in flags else START_TIMEOUT_S


def _wait_until_healthy(server: ServerProcess, seconds: float, on_wait: Callable[[float], None] | None) -> None:
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < seconds:
        server.check_alive()
        if server.client.healthy():
            return
        if on_wait is not None:
            on_wait(elapsed)
        time.sleep(1.0)
    raise RolloutError(f"the server did not answer within {seconds:.0f} s: {last_line(server.log)} (log: {server.log})")


def _ended(process: subprocess.Popen[bytes], grace_s: float = 2.0) -> bool:
    """True if the process has ended or does so in a moment: connections break before the process is gone."""
    try:
        process.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: politely to the leader's children too, then for good."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
