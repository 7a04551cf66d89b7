"""Section `rollout`: plain decode against draft lengths and the controller, in turns in one server, over batch sizes
and contexts, at temperature 1. The most telling cells come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sglang_er.cli.common import card_of
from sglang_er.kernels.registry import REFERENCE
from sglang_er.rollout import contest, prompts, report
from sglang_er.rollout.client import Client
from sglang_er.rollout.contest import Contest
from sglang_er.rollout.measure import Block

from .sections import Cell, Context, Options, Section, Skip
from .servers import KINDS

BATCHES, CONTEXTS, MOST_TOKENS = (1, 4, 16, 64, 128), (1024, 8192, 16384), 1 << 20
FIRST = (("7b", 1, 1024), ("7b", 16, 8192), ("7b", 64, 16384))
ARMS, ROUNDS, OUTPUT = "fixed:3,fixed:5,goodput", 3, 128
DRY_ARMS, DRY_ROUNDS, DRY_CELLS, DRY_OUTPUT = "fixed:3,goodput", 1, (("fp32", 1, 48), ("fp32", 2, 48)), 24
# Slots that the engine reserves for a request beyond its tokens.
RESERVE = 64


def cells(options: Options) -> Sequence[Cell]:
    chosen: Sequence[tuple[str, int, int]] = DRY_CELLS if options.dry_run else grid()
    arms, rounds, output = (DRY_ARMS, DRY_ROUNDS, DRY_OUTPUT) if options.dry_run else (ARMS, ROUNDS, OUTPUT)
    return [
        Cell(f"{kind} B={batch} S={size}", partial(measure, kind, batch, size, output, arms, rounds))
        for kind, batch, size in chosen
    ]


def grid() -> tuple[tuple[str, int, int], ...]:
    rest = [
        (kind, batch, size)
        for kind in ("7b", "1.5b")
        for size in CONTEXTS
        for batch in BATCHES
        if batch * size <= MOST_TOKENS
    ]
    # Through the attention that SGLang itself takes on this GPU, or on others.
    others = [(f"{kind} {name}", batch, size) for name in ("fa3", "flashinfer") for kind, batch, size in FIRST]
    return tuple(dict.fromkeys([*FIRST, *rest, *others]))


def measure(kind: str, batch: int, size: int, output: int, arms: str, rounds: int, context: Context) -> dict[str, Any]:
    client = client_of(context, kind)
    require_pool(client, batch * (size + output + RESERVE))
    card = card_of(Path(client.model_path()))
    requests = prompts.make_requests([output] * batch, size, prompts.knows_the_task(card), seed=0)
    plan = Contest(contest.parse_arms(arms), [requests] * rounds, batch)
    client.flush_cache()
    blocks = contest.run(client, plan, lambda *_: None, lambda: 0.0)
    found = contest.to_json(plan, blocks)["arms"]
    shown = ", ".join(f"{name} {arm['speed_up']['median']:.2f}x" for name, arm in found.items() if name != "plain")
    plain = report.median_rate(blocks["plain"])
    return {
        "shown": f"plain {plain:.0f} tokens/s; {shown}",
        "batch": batch,
        "context": size,
        "output": output,
        "temperature": plan.temperature,
        "arms": {name: arm | step_facts(blocks[name], batch) for name, arm in found.items()},
        **model_facts(card, blocks),
    }


def client_of(context: Context, kind: str) -> Client:
    """Of a server of that kind. Raises RuntimeError where plain torch computes for a kernel: that is no benchmark."""
    assert context.servers is not None
    client = Client(context.servers.get(kind).url)
    chosen = client.state()["kernels"] if KINDS[kind].ours and context.options.device != "cpu" else {}
    if fallen := [op for op, name in chosen.items() if name.startswith(REFERENCE)]:
        raise RuntimeError(f"plain torch computes {', '.join(fallen)}: see the server's log")
    return client


def require_pool(client: Client, tokens: int) -> None:
    """Raises Skip where the KV pool does not hold so many."""
    pool = int(client.send("GET", "/server_info").json()["max_total_num_tokens"])
    if tokens > pool:
        raise Skip(f"needs {tokens} tokens of KV, the pool has {pool}")


def step_facts(blocks: Sequence[Block], batch: int) -> dict[str, Any]:
    """Milliseconds of a step of the whole batch, by draft length."""
    costs = report.all_steps(list(blocks)).costs
    by_gamma = {gamma: cost for (size, gamma), cost in costs.items() if size == batch}
    return {"step_ms": {gamma: round(1e3 * seconds / steps, 4) for gamma, (steps, seconds) in by_gamma.items()}}


def model_facts(card: Mapping[str, Any], blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """`alpha`: accepted over verified drafts of all arms here; `alpha_stated`: that of the model's card."""
    steps = report.all_steps([block for arm in blocks.values() for block in arm])
    return {
        "model": f"{card.get('arch')} {card.get('shape')}, layer sizes of {card.get('sizes_of')}",
        "kappa": card.get("kappa"),
        "alpha_stated": card.get("alpha"),
        "alpha": None if steps.alpha is None else round(steps.alpha, 4),
    }


SECTION = Section("rollout", cells)
