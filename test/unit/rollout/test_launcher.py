"""What a user is told about a server that cannot start or that died, and that no process stays behind."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from sglang_er.rollout import launcher
from sglang_er.rollout.errors import RolloutError


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """A Python one-liner in the place of the server."""

    def set_program(code: str) -> None:
        monkeypatch.setattr(launcher, "serve_command", lambda *_: [sys.executable, "-c", code])

    return set_program


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind((launcher.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RolloutError, match=f"port {port} cannot be used"):
            launcher.choose_port(port)
    assert launcher.choose_port(None) in launcher.PORTS


def test_a_server_that_ends_is_reported_with_its_error_and_its_log(program, tmp_path: Path):
    program("print('loading'); print('sglang-er: no such model'); print('bye'); raise SystemExit(2)")
    log = tmp_path / "logs" / "server.log"
    with pytest.raises(RolloutError) as caught, launcher.running_server(tmp_path, 1, log):
        pass
    assert str(caught.value) == f"the server ended with exit code 2: sglang-er: no such model (log: {log})"


def test_a_request_that_fails_because_the_server_died_names_the_cause(program, tmp_path: Path, monkeypatch):
    program("import time; time.sleep(1); print('MemoryError: no room'); raise SystemExit(1)")
    monkeypatch.setattr(launcher.Client, "healthy", lambda self: True)
    with (
        pytest.raises(RolloutError, match="exit code 1: MemoryError: no room"),
        launcher.running_server(tmp_path, 1, tmp_path / "log"),
    ):
        raise RolloutError("connection refused")


def test_children_of_the_server_end_with_it_when_the_user_interrupts(program, tmp_path: Path, monkeypatch):
    child = "import time; time.sleep(600)"
    program(f"import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', '{child}']); "
            "print(c.pid, flush=True); time.sleep(600)")  # fmt: skip
    log = tmp_path / "log"
    monkeypatch.setattr(launcher.Client, "healthy", lambda self: bool(log.read_text().strip()))
    with pytest.raises(KeyboardInterrupt), launcher.running_server(tmp_path, 1, log):
        pid = int(log.read_text())
        raise KeyboardInterrupt
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    """An ended process whose parent is gone stays listed until somebody collects it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its log is empty"),
        ("starting\n\nready\n", "ready"),
        ("Traceback\n  File x\ntorch.OutOfMemoryError: 3 GiB\n[2026-01-01 10:00:00] kill_process_tree\n", "3 GiB"),
    ],
)
def test_the_line_that_says_most_is_chosen(text, said, tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(text)
    assert launcher.last_line(log).endswith(said)
