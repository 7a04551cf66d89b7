"""What scripts/version_env.py installs for another SGLang: the lock's packages, at the version's own pins where they
differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("version_env", "check_env"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import version_env

    return version_env


def needs(*lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def test_a_version_that_asks_for_nothing_else_gets_the_lock(env: Any) -> None:
    lines = env.packages("0.0", needs("torch==2.13.0", "transformers", "numpy>=1.0"))
    locked = env.pins(SCRIPTS.parent / "requirements" / "cpu.lock")
    kept = [f"{name}=={pin}" for name, pin in locked.items() if name not in ("sglang", "torchvision")]
    assert lines == ["torch==2.13.0", *kept, "torchvision==0.28.*"]


def test_its_own_pins_win_and_torchvision_follows_torch(env: Any) -> None:
    lines = env.packages("0.0", needs("torch==2.11.0", "llguidance<0.8.0,>=0.7.11", "Partial_JSON_parser"))
    assert "torch==2.11.0" in lines and "torchvision==0.26.*" in lines
    assert next(line for line in lines if line.startswith("llguidance")) in (
        "llguidance<0.8.0,>=0.7.11",
        "llguidance>=0.7.11,<0.8.0",
    )
    assert sum(line.startswith("partial-json-parser") for line in lines) == 1


def test_cuda_only_packages_are_left_out(env: Any) -> None:
    lines = env.packages("0.0", needs("torch==2.13.0", "flashinfer_python==0.6.18", "sglang-kernel==0.4.7"))
    assert not [line for line in lines if line.startswith(("flashinfer", "sglang"))]


def test_environments_lie_outside_of_the_repository(env: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.folder("0.5.23") == tmp_path / "sglang-er" / "versions" / "0.5.23"
