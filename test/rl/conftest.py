"""The suite's sessions with the shared servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server import Server

from sglang_er.engine.weight_sender import WeightSender
from sglang_er.rollout.conformance.session import Options, Session

FlatModel = Callable[[str, int], Path]


def examined(server: Server, *weights: Path, destructive: bool = False) -> Session:
    """A session that may change weights."""
    return Session(server.url, Options([str(path) for path in weights], destructive, WeightSender()))


@pytest.fixture(scope="module")
def on_spec(updated_spec: Any) -> Iterator[Session]:
    """The `spec` server on seed 0, which every check leaves as it was."""
    session = examined(updated_spec.server, updated_spec.checkpoints[1], updated_spec.checkpoints[0])
    yield session
    session.close()


@pytest.fixture(scope="module")
def on_areal(server: Callable[[str], Server], flat_model: FlatModel) -> Iterator[Session]:
    """The server that was launched as AReaL does it."""
    session = examined(server("areal"), flat_model("qwen3", 1), flat_model("qwen3", 0), destructive=True)
    yield session
    session.close()


@pytest.fixture(scope="module")
def on_seeded(server: Callable[[str], Server], flat_model: FlatModel) -> Iterator[Session]:
    """The server that was launched as slime does it."""
    session = examined(server("seeded"), flat_model("qwen3", 1), flat_model("qwen3", 0))
    yield session
    session.close()
