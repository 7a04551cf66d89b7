"""C24-C26: how frameworks launch a server, which a running one cannot show.

C26, options that are refused at start, is test/e2e/test_startup.py: each refusal starts a process for half a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support.server import Server

from sglang_er.rollout.conformance.generation import rollout_requests
from sglang_er.rollout.conformance.session import Session

pytestmark = pytest.mark.server


def test_c24_slime_builds_server_args_without_plugins(server: Callable[[str], Server], on_seeded: Session) -> None:
    """The `seeded` server: ServerArgs resolved in the parent, launch_server spawned, nothing of ours called."""
    assert "support.framework_launch" in " ".join(server("seeded").process.args)
    assert on_seeded.info["speculative_algorithm"] == "EFFICIENT_ROLLOUT"
    assert server("seeded").request("GET", "/health").status_code == 200
    assert rollout_requests(on_seeded) is None
    on_seeded.restore()


def test_c25_areal_passes_flags_to_sglangs_launcher(server: Callable[[str], Server], on_areal: Session) -> None:
    """The `areal` server: `-m` launcher with the flags that AReaL sets by default, the algorithm among them."""
    assert "support.areal_launch" in " ".join(server("areal").process.args)
    assert on_areal.info["skip_tokenizer_init"] and on_areal.info["disable_radix_cache"]
    assert on_areal.info["chunked_prefill_size"] == -1
    assert server("areal").request("GET", "/health").status_code == 200
    models = json.loads(server("areal").request("GET", "/v1/models").text)
    assert models["data"], "AReaL's older launchers wait for /v1/models"
