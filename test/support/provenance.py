"""What must be true of every reply that carries provenance, and how to switch it on for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from support.server import Server

Reply = dict[str, Any]
SOURCES, DRAFT_LOGPROBS = "output_token_sources", "output_token_draft_logprobs"
EPOCHS, VERSIONS = "output_token_weight_epochs", "output_token_weight_versions"
KEYS = (SOURCES, DRAFT_LOGPROBS, EPOCHS, VERSIONS)
ASKING = {"custom_params": {"return_provenance": True}}


@contextmanager
def provenance(server: Server, mode: str = "all") -> Iterator[None]:
    server.set_policy(provenance=mode)
    try:
        yield
    finally:
        server.set_policy(provenance="off")


def assert_absent(reply: Reply) -> None:
    assert not [key for key in KEYS if key in reply["meta_info"]]


def assert_aligned(reply: Reply) -> None:
    """One entry of each kind per output token, and a logprob of the twin where, and only where, it drafted."""
    meta, tokens = reply["meta_info"], len(reply["output_ids"])
    assert [len(meta[key]) for key in KEYS] == [tokens] * 4
    assert set(meta[SOURCES]) <= {"prefill", "plain", "draft", "bonus", "resampled"}
    for source, logprob in zip(meta[SOURCES], meta[DRAFT_LOGPROBS]):
        assert (logprob is None) == (source != "draft") and (logprob is None or logprob <= 0), (source, logprob)
    assert meta[EPOCHS] == sorted(meta[EPOCHS]) and all(type(epoch) is int for epoch in meta[EPOCHS])
    assert all(type(version) is str for version in meta[VERSIONS])


def assert_counts_agree(reply: Reply) -> None:
    """With SGLang's own counters (absent without a step behind the prefill), which also count the drafts that a stop or
    a limit trimmed from the last step."""
    assert_aligned(reply)
    meta = reply["meta_info"]
    found = Counter(meta[SOURCES])
    trimmed = meta.get("spec_num_correct_drafts", 0) - found["draft"]
    cut = meta[SOURCES][-1:] == ["draft"]  # the last step's own last token is none
    assert found["plain"] + found["bonus"] + found["resampled"] + cut == meta.get("spec_verify_ct", 0), (found, meta)
    assert trimmed >= 0 if cut else trimmed == 0, (found, meta)
    assert found["prefill"] == 1 + meta["num_retractions"] or meta["num_retractions"], (found, meta)


def sources_of(steps: Sequence[tuple[int, int]], tokens: int) -> list[str]:
    """What the (draft length, accept length) of every step imply, the first token made by the prefill."""
    found = ["prefill"]
    for gamma, accepted in steps:
        found += ["draft"] * (accepted - 1)
        found.append("plain" if gamma == 0 else "bonus" if accepted == gamma + 1 else "resampled")
    return found[:tokens]


def draft_runs(sources: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(first, end) of the accepted drafts of every step."""
    start = 0
    while start < len(sources):
        end = start
        while end < len(sources) and sources[end] == "draft":
            end += 1
        if end > start:
            yield start, end
        start = end + 1
