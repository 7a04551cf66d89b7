"""Section `exact`: outputs under speculation against plain decode (gamma 0) of the same server, small random models.

fp32, greedy and seeded: equal. bf16: the share of equal outputs is recorded; rounding, which depends on the shape of a
forward pass, decides near ties there, in plain decode as well.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from support.server import Server

from .sections import Cell, Context, Options, Section, Skip

GAMMAS: tuple[int | str, ...] = (1, 3, 5, 7, "cycle")
PROMPTS, TOKENS, CONCURRENCY = 32, 128, 16
# Greedy outputs that come nearer to a tie than this (top-2 logprobs) are not compared: rounding, which depends on the
# batch in plain decode as well, may decide them.
LEAST_MARGIN, CANDIDATES = 2e-5, 44
# Logprobs do not show how near a seeded choice was to a tie; one output of 32 may be decided by rounding.
SEEDED_TIES = 1
LEAST_DISTINCT = 10


def cells(options: Options) -> Sequence[Cell]:
    greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    seeded = [{**greedy, "temperature": 1, "sampling_seed": seed} for seed in range(PROMPTS)]
    return [
        Cell("fp32 greedy", partial(measure, "fp32", [greedy] * PROMPTS, 0)),
        Cell("fp32 seeded", partial(measure, "fp32", seeded, SEEDED_TIES)),
        Cell("bf16 greedy", partial(measure, "bf16", [greedy] * PROMPTS, None)),
        Cell("fp32 greedy, KV shadow", partial(measure, "fp32", [greedy] * PROMPTS, 0, shadow="int4")),
        Cell("bf16 greedy, fa3", partial(measure, "bf16 fa3", [greedy] * PROMPTS, None)),
        Cell("bf16 greedy, flashinfer", partial(measure, "bf16 flashinfer", [greedy] * PROMPTS, None)),
        Cell("fp32 greedy, fp8 KV shadow", partial(measure, "fp32", [greedy] * PROMPTS, 0, shadow="fp8")),
    ]


def measure(
    kind: str, sampling: list[dict[str, Any]], ties: int | None, context: Context, shadow: str | None = None
) -> dict[str, Any]:
    """`ties`: outputs that may differ; None: all. `shadow`: drafts read a copy of the KV cache in this format."""
    if kind != "fp32" and (context.options.url is not None or context.options.dry_run):
        raise Skip("there is one server here, and it is fp32")
    if shadow == "fp8" and context.options.device == "cpu":
        raise Skip("an fp8 shadow is for GPUs")
    assert context.servers is not None
    server = context.servers.get(kind)
    if shadow:
        server.set_policy(kv_shadow=shadow, kv_shadow_from=0)
    try:
        rows = compare(server, sampling)
        state = server.state()["kv_shadow"]
    finally:
        if shadow:
            server.set_policy(kv_shadow="auto", kv_shadow_from=4096)
    if shadow and not (state and state["stored_slots"]):
        if context.options.device != "cpu":
            raise RuntimeError("no draft read the KV shadow")
        raise Skip("no draft read the KV shadow, which takes draft_graphs or the native executor")
    equal, of = (min(rows[str(gamma)][name] for gamma in GAMMAS) for name in ("equal", "of"))
    shown = f"{equal} of {of} outputs equal at least, {rows['distinct_tokens']} distinct tokens"
    return {"passed": passed(rows, ties), "shown": shown, "share_equal": equal / of, **rows}


def compare(server: Server, sampling: list[dict[str, Any]]) -> dict[str, Any]:
    """Outputs for every gamma against gamma 0 with the same sampling parameters (one per prompt)."""
    rng = random.Random(0)
    candidates = [[rng.randrange(256) for _ in range(rng.choice((3, 20, 70, 150)))] for _ in range(CANDIDATES)]
    server.fixed(0)
    repeated = [sampling[i % PROMPTS] for i in range(CANDIDATES)]
    replies = server.generate_all(candidates, repeated, CONCURRENCY, return_logprob=True, top_logprobs_num=2)
    greedy = sampling[0]["temperature"] == 0
    kept = [i for i, reply in enumerate(replies) if not greedy or margin(reply) >= LEAST_MARGIN][:PROMPTS]
    prompts, sampling = [candidates[i] for i in kept], [repeated[i] for i in kept]
    expected = [replies[i]["output_ids"] for i in kept]
    rows: dict[str, Any] = {}
    for gamma in GAMMAS:
        server.cycle() if gamma == "cycle" else server.fixed(int(gamma))
        before, started = server.state()["steps"], time.perf_counter()
        got = [reply["output_ids"] for reply in server.generate_all(prompts, sampling, CONCURRENCY)]
        seconds, after = time.perf_counter() - started, server.state()["steps"]
        steps = after["speculating_request_steps"] - before["speculating_request_steps"]
        accepted = after["accepted_drafts"] - before["accepted_drafts"]
        rows[str(gamma)] = {
            "equal": sum(a == b for a, b in zip(got, expected)),
            "of": len(expected),
            "accept_length": round(1 + accepted / steps, 4) if steps else None,
            "seconds": round(seconds, 3),
        }
    rows["distinct_tokens"] = len({token for tokens in expected for token in tokens})
    return rows


def margin(reply: dict[str, Any]) -> float:
    """Smallest distance between the best and the second best logprob of any output token."""
    return min(best[0] - second[0] for best, second in reply["meta_info"]["output_top_logprobs"])


def passed(rows: dict[str, Any], ties: int | None) -> bool:
    """Drafts were accepted, outputs said something, and all but `ties` of them are equal."""
    by_gamma = [rows[str(gamma)] for gamma in GAMMAS]
    return rows["distinct_tokens"] >= LEAST_DISTINCT and all(
        row["of"] > 0 and (ties is None or row["equal"] >= row["of"] - ties) and (row["accept_length"] or 0) > 1
        for row in by_gamma
    )


SECTION = Section("exact", cells)
