"""C27: tokens are drawn from the policy's distribution."""

from __future__ import annotations

from typing import Any

from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Check, expect
from sglang_er.rollout.conformance.session import Session
from sglang_er.rollout.conformance.statistic import POSITIONS, Uniformity, filtered

TOP_K = 20
SETTINGS: dict[str, dict[str, float]] = {
    "T=1, top_k": {"temperature": 1.0},
    "T=0.7, top_k": {"temperature": 0.7},
    "T=0.7, top_k, top_p=0.9": {"temperature": 0.7, "top_p": 0.9},
}
REQUESTS, TOKENS = 48, 96
CONVENTIONS = (False, True)


def sample(session: Session, sampling: dict[str, Any], requests: int, seed: int = 200) -> dict[bool, Uniformity]:
    """The statistic of `requests` responses, for both meanings of top_p beside top_k."""
    wanted = [
        bodies.slime(session.prompt(seed + i, 8 + i % 24), TOKENS, ignore_eos=True, top_k=TOP_K, **sampling)
        | {"top_logprobs_num": TOP_K}
        for i in range(requests)
    ]
    found = {first_k: Uniformity() for first_k in CONVENTIONS}
    for reply in session.all(wanted):
        replies.aligned(reply, "sampled", TOKENS)
        tops = reply["meta_info"]["output_top_logprobs"]
        # The first token is the prefill's: no draft takes part in it.
        for position, (token, top) in enumerate(zip(replies.output_ids(reply), tops)):
            if position == 0:
                continue
            ranked = [(float(entry[0]), int(entry[1])) for entry in top]
            groups = ("all", f"position mod {POSITIONS} = {position % POSITIONS}")
            for first_k, statistic in found.items():
                statistic.add(filtered(ranked, sampling.get("top_p", 1.0), first_k), token, groups)
    return found


def judged(session: Session, name: str, requests: int = REQUESTS) -> str:
    """Raises Broken if the tokens cannot have been drawn from the policy; else the smallest p-value."""
    found = sample(session, SETTINGS[name], requests)
    best = min(found.values(), key=lambda statistic: len(statistic.rejected()))
    rejected = best.rejected()
    expect(
        not rejected,
        "exact",
        f"{name}: {best.tokens} tokens are not drawn from the returned logprobs: "
        + ", ".join(f"{group} p={value:.1g}" for group, value in list(rejected.items())[:3])
        + (f"; {best.impossible} outside the filters" if best.impossible else ""),
    )
    values = best.p_values()
    return f"{name}: {best.tokens} tokens, smallest p {min(values.values()):.2g}"


def distributed_as_the_policy(session: Session) -> str | None:
    """C27."""
    session.draft()
    return "; ".join(judged(session, name) for name in SETTINGS)


CHECKS = (Check("C27", "sampled tokens are distributed as the policy's", distributed_as_the_policy),)
