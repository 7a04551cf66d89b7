"""Test hook inside a real server (SGLANG_ER_TEST_HOOK): deliberately wrong samplers, switched through the policy."""

from __future__ import annotations

from typing import Any


def install(worker: Any) -> None:
    """Called with the worker once it is built; replaced by the statistics tests with their mutants."""
