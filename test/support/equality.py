"""What the exactness tests compare, and the proof that speculation took part in what was compared."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from support.server import Server

Reply = dict[str, Any]


def greedy(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def ids(replies: Sequence[Reply]) -> list[list[int]]:
    return [reply["output_ids"] for reply in replies]


def cached(replies: Sequence[Reply]) -> list[int]:
    return [reply["meta_info"]["cached_tokens"] for reply in replies]


def retractions(replies: Sequence[Reply]) -> int:
    return sum(reply["meta_info"]["num_retractions"] for reply in replies)


def accept_counts(replies: Sequence[Reply]) -> list[list[int]]:
    """Per request: how many of its steps accepted 0, 1, 2, ... drafts."""
    return [reply["meta_info"]["spec_correct_drafts_histogram"] for reply in replies]


def accept_length(replies: Sequence[Reply]) -> float:
    """Tokens committed per step and request, over all requests (exact only while every step drafts)."""
    steps = sum(sum(histogram) for histogram in accept_counts(replies))
    accepted = sum(n * steps for histogram in accept_counts(replies) for n, steps in enumerate(histogram))
    return 1 + accepted / steps


# A random model may fall into a loop, where every draft is right and errors hide.
LEAST_DISTINCT = 10


def lively(
    prompts: Sequence[list[int]], outputs: Sequence[list[int]], count: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The first `count` prompts whose output has at least LEAST_DISTINCT different tokens, and those outputs."""
    kept = [pair for pair in zip(prompts, outputs, strict=True) if len(set(pair[1])) >= LEAST_DISTINCT][:count]
    assert len(kept) == count, f"only {len(kept)} of {len(prompts)} outputs are lively: the model is degenerate"
    return [prompt for prompt, _ in kept], [output for _, output in kept]


def assert_same(got: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], what: str) -> None:
    """Token-for-token equality; a failure names the requests and the first differing position of each."""
    assert len(got) == len(expected)
    wrong = []
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if list(mine) != list(theirs):
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
            wrong.append(f"request {index}: token {at} of {len(theirs)} ({list(mine[at : at + 3])}...)")
    assert not wrong, f"{what}: {len(wrong)} of {len(got)} outputs differ: {'; '.join(wrong[:8])}"


@dataclass
class StepDelta:
    """What the engines' steps did while a block ran."""

    by_gamma: Counter[int] = field(default_factory=Counter)
    drafted: int = 0
    accepted: int = 0

    def assert_speculated(self, gamma: int | None = None) -> None:
        """Drafts were made, some accepted, some rejected; `gamma`: most steps had that length, None: at least
        three lengths and plain decode took part."""
        assert 0 < self.accepted < self.drafted, self
        total = sum(self.by_gamma.values())
        if gamma is None:
            used = {g for g, steps in self.by_gamma.items() if steps}
            assert 0 in used and len(used) >= 4, self
        else:
            # Fewer are drafted only in the last steps of a batch and at the context end.
            assert self.by_gamma[gamma] > total / 2, self


def _totals(server: Server) -> StepDelta:
    totals = StepDelta()
    for engine in server.get("/er/state")["engines"]:
        steps = engine["steps"]
        totals.by_gamma.update({int(gamma): count for gamma, count in steps["steps_by_gamma"].items()})
        totals.drafted += steps["drafted_tokens"]
        totals.accepted += steps["accepted_drafts"]
    return totals


@contextmanager
def steps_of(server: Server) -> Iterator[StepDelta]:
    """Yields a StepDelta that is filled in when the block ends."""
    before, delta = _totals(server), StepDelta()
    yield delta
    after = _totals(server)
    delta.by_gamma = after.by_gamma - before.by_gamma
    delta.drafted, delta.accepted = after.drafted - before.drafted, after.accepted - before.accepted


def set_gamma(server: Server, gamma: int | str) -> None:
    """A fixed draft length, or "cycle"."""
    if gamma == "cycle":
        server.cycle()
    else:
        server.fixed(int(gamma))


def fixed_gamma(gamma: int | str) -> int | None:
    return None if gamma == "cycle" else int(gamma)


def assert_pool_empty(server: Server) -> None:
    """After a flush no KV slot is in use. SGLang's own idle check ends the server on a leak, so it must be alive."""
    server.flush_cache()
    deadline = time.monotonic() + 10
    while any(used := [load["num_used_tokens"] for load in server.get("/v1/loads")["loads"]]):
        assert time.monotonic() < deadline, f"KV slots still in use on an idle, flushed server: {used}"
        time.sleep(0.2)
    assert server.alive(), server.log_tail()
    assert not re.search(r"memory leak|use-after-free", server.log_text(), re.IGNORECASE), server.log_tail()


def prefill_chunks(log: str) -> list[int]:
    """Tokens of every prefill batch in a server log."""
    return [int(n) for n in re.findall(r"Prefill batch, .*?#new-token: (\d+)", log)]


@contextmanager
def whole_passes(server: Server, **options: Any) -> Iterator[None]:
    """Inside, drafts are made by the function that GPUs record as a graph, called over its buffers. Some must be."""
    options = {"executor": "wrapped", "draft_graphs": "eager", "kv_shadow": "off", **options}
    before = server.state()["forwards"].get("draft_loop", 0)
    server.set_policy(**options)
    try:
        yield
        assert server.state()["forwards"].get("draft_loop", 0) > before, "no whole pass was drafted"
    finally:
        server.set_policy(executor="native", draft_graphs="auto", kv_shadow="auto", kv_shadow_from=4096)
