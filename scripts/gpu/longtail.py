"""Section `longtail`: one long-tail rollout, 128 requests at once, 8 samples of each prompt, under each policy: the
seconds until the last response. A cell is one policy; all of them run in the same server on the same requests.

The paper's rule (`sglang_er.policy.paper`) begins to draft once per rollout, when its roofline promises enough; while a
rollout only drains, that is one batch size from which on it drafts, so a live server runs it as policy `threshold`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from sglang_er.cli.common import card_of
from sglang_er.policy import paper
from sglang_er.rollout import bench, lengths, prompts, roofline
from sglang_er.rollout.client import Client
from sglang_er.rollout.measure import PLAIN, jobs_of, run_jobs, send_all
from sglang_er.rollout.prompts import Request

from .records import gpu
from .rollouts import client_of, model_facts
from .sections import Cell, Context, Options, Section

REQUESTS, SAMPLES, MEAN, CAP, PROMPT = 128, 8, 650, 8192, 512
DRY_REQUESTS, DRY_SAMPLES, DRY_MEAN, DRY_CAP, DRY_PROMPT = 8, 4, 16, 64, 32
PAPER_GAMMA, PAPER_CONTEXT = 7, PROMPT + MEAN
ARMS = ("plain", "goodput", "fixed:3", "paper")


def cells(options: Options) -> Sequence[Cell]:
    return [Cell(f"7b {arm}", partial(measure, arm)) for arm in ARMS]


def measure(arm: str, context: Context) -> dict[str, Any]:
    client = client_of(context, "7b")
    card = card_of(Path(client.model_path()))
    requests = rollout(context.options.dry_run, prompts.knows_the_task(card))
    usual = bench.switchable(client.state())
    policy = {**usual, **policy_of(arm, context.options.dry_run)}
    try:
        _warm(client, requests, usual)
        block, _ = run_jobs(client, policy, jobs_of(client, requests, 1.0), len(requests))
    finally:
        client.set_policy(usual)
    plain = context.find("longtail", "7b plain")
    over_plain = plain["values"]["makespan"] / block.seconds if plain and "makespan" in plain["values"] else None
    speed_up = "" if arm == "plain" or over_plain is None else f", {over_plain:.2f}x of plain decode"
    return {
        "shown": f"{block.seconds:.1f} s, {block.tokens_per_second:.0f} tokens/s{speed_up}",
        "policy": policy,
        "makespan": block.seconds,
        "over_plain": over_plain,
        "tokens": block.tokens,
        "tokens_per_second": block.tokens_per_second,
        "accept_length": block.steps.accept_length,
        "steps_by_gamma": block.steps.steps_by_gamma,
        "lengths": [request.output_tokens for request in requests],
        "samples": DRY_SAMPLES if context.options.dry_run else SAMPLES,
        **model_facts(card, {arm: [block]}),
    }


def rollout(dry_run: bool, task_text: bool) -> list[Request]:
    """Lengths of the committed file, scaled; samples of a prompt lie next to each other."""
    count, samples, mean, cap, prompt = (
        (DRY_REQUESTS, DRY_SAMPLES, DRY_MEAN, DRY_CAP, DRY_PROMPT)
        if dry_run
        else (REQUESTS, SAMPLES, MEAN, CAP, PROMPT)
    )
    drawn = list(chain.from_iterable(lengths.load()))[:count]
    factor = mean / statistics.fmean(drawn)
    scaled = [min(cap, max(1, round(length * factor))) for length in drawn]
    heads = prompts.make_requests([1] * (count // samples), prompt, task_text, seed=0)
    return [Request(heads[index // samples].input_ids, length) for index, length in enumerate(scaled)]


def policy_of(arm: str, dry_run: bool) -> Mapping[str, Any]:
    if arm == "plain":
        return PLAIN
    if arm == "paper":
        preset = "cpu" if dry_run else "h200" if "H200" in gpu()[0] else "h100"
        limit = paper_batch(roofline.make(preset, "7b").paper_constants())
        return {"policy": "threshold", "thresholds": f"{limit}:{PAPER_GAMMA}"}
    kind, _, gamma = arm.partition(":")
    return {"policy": kind, **({"gamma": int(gamma)} if gamma else {})}


def paper_batch(constants: paper.Roofline) -> int:
    """The largest batch, up to the rollout's, at which the paper's rule begins to draft; 1 where it never would."""
    gamma, least = PAPER_GAMMA, 1 + paper.MARGIN
    gains = (n for n in range(REQUESTS, 0, -1) if constants.speed_up(n, PAPER_CONTEXT, gamma, gamma) >= least)
    return next(gains, 1)


def _warm(client: Client, requests: Sequence[Request], usual: Mapping[str, Any]) -> None:
    """Prompts into the prefix cache, and whatever is made at the first draft."""
    client.set_policy({**usual, "policy": "fixed", "gamma": 1})
    send_all(jobs_of(client, requests, 1.0, tokens=4), at_once=len(requests))


SECTION = Section("longtail", cells)
