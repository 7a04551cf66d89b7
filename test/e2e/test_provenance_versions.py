"""Tokens keep the version of the policy that they were sampled under, through pauses, retractions and aborts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.equality import assert_same, greedy, ids
from support.prompts import mixed_prompts
from support.provenance import EPOCHS, KEYS, SOURCES, VERSIONS, assert_aligned, provenance
from support.server import Server
from support.updates import Reply, other_weights, post_weights, wait_for_decoding

pytestmark = pytest.mark.server

PROMPTS, TOKENS = mixed_prompts(6, seed=81, longest=60), 400


@pytest.fixture
def on_seed_1(updated_spec: Any) -> Iterator[Server]:
    """The `spec` server on seed 1, version "one", with provenance for all."""
    spec: Server = updated_spec.server
    before = spec.get("/model_info")["weight_version"]
    with other_weights(updated_spec):
        post_weights(spec, updated_spec.checkpoints[1], weight_version="one")
        spec.fixed(5)
        with provenance(spec):
            yield spec
    spec.post("/update_weight_version", {"new_version": before, "abort_all_requests": False})


@contextmanager
def running(spec: Server, committed: int = 0) -> Iterator[list[Reply]]:
    """Six requests that are under way inside the block, with so many tokens together; their replies after it."""
    replies: list[Reply] = []
    before = spec.state()["steps"]["committed_tokens"]
    rids = [f"versions-{i}" for i in range(len(PROMPTS))]

    def one(index: int) -> None:
        replies.append(spec.generate(PROMPTS[index], greedy(TOKENS), rid=rids[index]))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    wait_for_decoding(spec)
    deadline = time.monotonic() + 60
    while spec.state()["steps"]["committed_tokens"] < before + committed and time.monotonic() < deadline:
        time.sleep(0.01)
    yield replies
    for thread in threads:
        thread.join()
    replies.sort(key=lambda reply: reply["meta_info"]["id"])


def spans(reply: Reply) -> list[str]:
    """SGLang's own version of every token."""
    found: list[str] = []
    for span in reply["meta_info"]["weight_versions"]:
        found += [span["version"]] * (span["end"] - span["start"])
    return found


def test_retracted_in_an_update(updated_spec: Any, plain: Server, on_seed_1: Server) -> None:
    """mode retract: old tokens keep epoch and version, the first new one comes from a prefill, and from there on the
    text is the new policy's. The versions are SGLang's."""
    spec = on_seed_1
    old = spec.state()["twin"]["weight_epoch"]
    with running(spec) as replies:
        spec.post("/pause_generation", {"mode": "retract"})
        post_weights(spec, updated_spec.checkpoints[0], weight_version="two")
        spec.post("/continue_generation")
    new = spec.state()["twin"]["weight_epoch"]
    switched = 0
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        assert_aligned(reply)
        meta, tokens = reply["meta_info"], reply["output_ids"]
        at = meta[VERSIONS].count("one")
        assert meta[VERSIONS] == ["one"] * at + ["two"] * (TOKENS - at) == spans(reply)
        assert meta[EPOCHS][:at] == [old] * at
        assert all(old < epoch <= new for epoch in meta[EPOCHS][at:])
        if 0 < at < TOKENS:
            switched += 1
            assert meta[SOURCES][at] == "prefill" and meta["num_retractions"] == 1
            rest = plain.generate(prompt + tokens[:at], greedy(TOKENS - at))["output_ids"]
            assert_same([tokens[at:]], [rest], f"continuation after token {at}")
    assert switched >= 2, "hardly a request was under way"


def test_paused_in_place(updated_spec: Any, on_seed_1: Server) -> None:
    """mode in_place: no prefill; a step that was launched before the update is the old policy's, though SGLang's own
    spans count its tokens when they arrive."""
    spec = on_seed_1
    with running(spec) as replies:
        spec.post("/pause_generation", {"mode": "in_place"})
        post_weights(spec, updated_spec.checkpoints[0], weight_version="two", flush_cache=False)
        spec.post("/continue_generation")
    longest_step = 1 + 5
    for reply in replies:
        assert_aligned(reply)
        meta = reply["meta_info"]
        at, theirs = meta[VERSIONS].count("one"), spans(reply).count("one")
        assert meta[VERSIONS] == ["one"] * at + ["two"] * (TOKENS - at)
        assert 0 <= at - theirs <= longest_step
        assert meta[SOURCES].count("prefill") == 1
    assert any(len(set(reply["meta_info"][VERSIONS])) == 2 for reply in replies)


def test_aborted_while_running(on_seed_1: Server) -> None:
    with running(on_seed_1) as replies:
        on_seed_1.request("POST", "/abort_request", json={"abort_all": True})
    for reply in replies:
        assert_aligned(reply)
    assert any(reply["meta_info"]["finish_reason"]["type"] == "abort" for reply in replies)


def test_aborted_in_the_queue(on_seed_1: Server) -> None:
    """Retracted requests that wait have what was sent of them; a new one has no token and empty lists."""
    spec, late = on_seed_1, []
    # SGLang hands tokens of replies that do not stream on every 50 steps: fewer would not have been sent.
    with running(spec, committed=len(PROMPTS) * TOKENS // 2) as replies:
        spec.post("/pause_generation", {"mode": "retract"})
        waiting = threading.Thread(target=lambda: late.append(spec.generate([5, 6, 7], greedy(8), rid="late")))
        waiting.start()
        time.sleep(0.5)
        spec.request("POST", "/abort_request", json={"abort_all": True})
        time.sleep(0.5)
        spec.post("/continue_generation")
    waiting.join()
    for reply in replies + late:
        assert_aligned(reply)
    aborted = [reply for reply in replies if reply["meta_info"]["finish_reason"]["type"] == "abort"]
    assert any(reply["output_ids"] for reply in aborted)
    if late[0]["meta_info"]["finish_reason"]["type"] == "abort":
        assert late[0]["output_ids"] == [] and all(late[0]["meta_info"][key] == [] for key in KEYS)
    assert len(ids(replies)) == len(PROMPTS)
