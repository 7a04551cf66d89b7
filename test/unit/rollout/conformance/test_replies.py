"""Every promise about a single reply, broken on purpose, is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from sglang_er.rollout.conformance import replies
from sglang_er.rollout.conformance.check import Broken


def good_reply() -> dict[str, Any]:
    ids = [7, 8, 9]
    return {
        "output_ids": ids,
        "meta_info": {
            "id": "a",
            "finish_reason": {"type": "stop", "matched": 9},
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "cached_tokens": 0,
            "weight_version": "2",
            "weight_versions": [{"version": "1", "start": 0, "end": 1}, {"version": "2", "start": 1, "end": 3}],
            "num_retractions": 0,
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "e2e_latency": 0.1,
        },
    }


def test_a_good_reply_passes() -> None:
    replies.aligned(good_reply(), "reply", budget=3)
    assert replies.spans(good_reply(), "reply") == [("1", 0, 1), ("2", 1, 3)]
    assert replies.output_ids(good_reply()) == [7, 8, 9]


Change = Callable[[dict[str, Any]], Any]
MISTAKES: list[tuple[str, str, Change]] = [
    ("a logprob too many", "L1", lambda r: r["meta_info"]["output_token_logprobs"].append([-0.1, 10, None])),
    ("another token", "L1", lambda r: r["output_ids"].__setitem__(1, 5)),
    ("wrong count", "L1", lambda r: r["meta_info"].update(completion_tokens=4)),
    ("not finite", "L2", lambda r: r["meta_info"]["output_token_logprobs"].__setitem__(0, [float("nan"), 7, None])),
    ("positive", "L2", lambda r: r["meta_info"]["output_token_logprobs"].__setitem__(0, [0.2, 7, None])),
    ("a token after the stop", "L1", lambda r: r["meta_info"].update(finish_reason={"type": "stop", "matched": 8})),
    ("unknown finish", "contract", lambda r: r["meta_info"].update(finish_reason={"type": "done"})),
    ("a bare abort", "contract", lambda r: r["meta_info"].update(finish_reason={"type": "abort"})),
    ("a key is missing", "contract", lambda r: r["meta_info"].pop("weight_version")),
]


@pytest.mark.parametrize(("what", "promise", "change"), MISTAKES, ids=[what for what, _, _ in MISTAKES])
def test_a_mistake_breaks_its_promise(what: str, promise: str, change: Change) -> None:
    reply = copy.deepcopy(good_reply())
    change(reply)
    with pytest.raises(Broken) as broken:
        replies.aligned(reply, "reply", budget=3)
    assert broken.value.promise == promise
    assert str(broken.value).startswith(f"{promise} (") and "\n" not in str(broken.value)


def test_an_abort_in_the_queue_has_less() -> None:
    """As SGLang 0.5.21 sends it; with tokens the same reply is broken."""
    reply = good_reply()
    reply["output_ids"] = []
    reply["meta_info"] = {
        "id": "a",
        "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
        "completion_tokens": 0,
        "weight_version": "1",
        "output_token_logprobs": [],
    }
    replies.aligned(reply, "reply")
    reply["meta_info"] |= {"completion_tokens": 1, "output_token_logprobs": [[-0.1, 7, None]]}
    with pytest.raises(Broken, match="lacks"):
        replies.aligned(reply, "reply")


def test_more_tokens_than_asked_for() -> None:
    with pytest.raises(Broken) as broken:
        replies.aligned(good_reply(), "reply", budget=2)
    assert broken.value.promise == "L3"


@pytest.mark.parametrize("spans", [[("1", 0, 2)], [("1", 0, 1), ("2", 2, 3)], [("1", 1, 3)]])
def test_versions_that_leave_a_gap(spans: list[tuple[str, int, int]]) -> None:
    reply = good_reply()
    reply["meta_info"]["weight_versions"] = [{"version": v, "start": a, "end": b} for v, a, b in spans]
    with pytest.raises(Broken) as broken:
        replies.spans(reply, "reply")
    assert broken.value.promise == "L5"


def test_accept_length_counts_no_prefill_token() -> None:
    reply = good_reply()
    assert replies.accept_length([reply]) is None
    reply["meta_info"]["spec_verify_ct"] = 1
    assert replies.accept_length([reply, reply]) == 2.0
