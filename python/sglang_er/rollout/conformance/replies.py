"""What every reply must hold, whatever was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_er.rollout.conformance.check import Broken, expect

Reply = Mapping[str, Any]
FINISHES = {
    "length": {"length"},
    "stop": {"matched"},
    "abort": {"message", "status_code", "err_type"},
}
# A request that was aborted in the queue has no more than this.
ALWAYS = ("id", "finish_reason", "completion_tokens", "weight_version", "output_token_logprobs")
META = (*ALWAYS, "prompt_tokens", "cached_tokens", "weight_versions", "num_retractions", "e2e_latency")


def finish(reply: Reply) -> str:
    """`length`, `stop` or `abort`."""
    return str((reply["meta_info"].get("finish_reason") or {}).get("type"))


def output_ids(reply: Reply) -> list[int]:
    """The tokens as trainers read them: from the logprobs."""
    return [int(entry[1]) for entry in reply["meta_info"]["output_token_logprobs"]]


def logprobs(reply: Reply) -> list[float]:
    """Of the output tokens."""
    return [float(entry[0]) for entry in reply["meta_info"]["output_token_logprobs"]]


def aligned(reply: Reply, what: str, budget: int | None = None) -> None:
    """One logprob per token, of that token; a finish reason of a known shape; at most `budget` tokens."""
    meta = reply["meta_info"]
    queued = finish(reply) == "abort" and not meta.get("completion_tokens")
    missing = [name for name in (ALWAYS if queued else META) if name not in meta]
    expect(not missing, "contract", f"{what}: meta_info lacks {', '.join(missing)}")
    entries, ids, counted = (
        meta["output_token_logprobs"],
        list(reply.get("output_ids") or []),
        meta["completion_tokens"],
    )
    expect(
        len(entries) == counted == len(ids),
        "L1",
        f"{what}: {len(entries)} logprobs, {len(ids)} tokens, completion_tokens {counted}, finish {finish(reply)}",
    )
    wrong = next((i for i, (entry, token) in enumerate(zip(entries, ids)) if entry[1] != token), None)
    expect(wrong is None, "L1", f"{what}: logprob {wrong} is of another token")
    values = logprobs(reply)
    bad = next((i for i, value in enumerate(values) if not math.isfinite(value) or value > 1e-4), None)
    expect(bad is None, "L2", f"{what}: logprob {bad} is {values[bad or 0] if values else None}")
    _finished(reply, what, queued)
    if budget is not None:
        expect(counted <= budget, "L3", f"{what}: {counted} tokens, {budget} were asked for")


def _finished(reply: Reply, what: str, queued: bool) -> None:
    reason = reply["meta_info"]["finish_reason"]
    kind = (reason or {}).get("type")
    if kind not in FINISHES:
        raise Broken("contract", f"{what}: finish_reason {reason}")
    missing = ({"message"} if queued else FINISHES[kind]) - set(reason)
    expect(not missing, "contract", f"{what}: finish_reason {reason} lacks {', '.join(sorted(missing))}")
    ids, matched = output_ids(reply), reason.get("matched")
    if kind == "stop" and isinstance(matched, int):
        expect(ids and ids[-1] == matched, "L1", f"{what}: stopped by token {matched}, but the last is {ids[-1:]}")


def spans(reply: Reply, what: str) -> list[tuple[str, int, int]]:
    """The reply's weight versions as (version, start, end), which must cover its tokens without a gap."""
    found = [(str(s["version"]), int(s["start"]), int(s["end"])) for s in reply["meta_info"]["weight_versions"]]
    count = reply["meta_info"]["completion_tokens"]
    at = 0
    for version, start, end in found:
        expect(start == at and end >= start, "L5", f"{what}: version {version} covers {start}..{end}, expected {at}..")
        at = end
    expect(at == count, "L5", f"{what}: weight_versions cover {at} of {count} tokens: {found}")
    return found


def accept_length(replies: Sequence[Reply]) -> float | None:
    """Tokens per verify step over all requests; None where the server does not speculate."""
    steps = sum(int(reply["meta_info"].get("spec_verify_ct") or 0) for reply in replies)
    # The first token of every request comes from its prefill.
    tokens = sum(reply["meta_info"]["completion_tokens"] - 1 for reply in replies)
    return tokens / steps if steps else None
