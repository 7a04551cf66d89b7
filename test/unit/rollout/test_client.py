"""A kept connection that the server closes as it is used again costs nothing; one that always closes is an error."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sglang_er.rollout.client import Client
from sglang_er.rollout.errors import RolloutError

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@contextmanager
def closing_server(closed: int) -> Iterator[tuple[str, list[bytes]]]:
    """Closes the first `closed` connections with a request in hand, answers the others; the requests that it saw."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(65536))
                    if len(seen) > closed:
                        connection.sendall(ANSWER)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen


def test_a_connection_that_was_closed_under_a_request_is_replaced_once():
    with closing_server(closed=1) as (url, seen):
        assert Client(url).send("POST", "/generate", {"text": "a"}).status_code == 200
        assert len(seen) == 2


def test_a_server_that_always_closes_is_an_error_of_one_line():
    with closing_server(closed=9) as (url, seen):
        with pytest.raises(RolloutError, match="POST /generate: "):
            Client(url).send("POST", "/generate", {"text": "a"})
        assert len(seen) == 2


def test_nobody_there_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RolloutError, match="refused"):
        Client(f"http://127.0.0.1:{port}").send("GET", "/er/state")
