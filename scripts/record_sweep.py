#!/usr/bin/env python3
"""Step costs of this machine as a sweep that `sglang-er simulate --sweep FILE` reads.

    python scripts/record_sweep.py --shape 0.5b --csv FILE

A live server runs batches of each size at each draft length; a step's seconds are those since the end of the forward
before it, SGLang's own work and sampling included. The draft pass is timed apart (CPUs), the rest is the verify pass.
The file's median_ms are medians over `--rounds`.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from sglang_er.cli.common import cache_dir, cached_model
from sglang_er.rollout import launcher, machine, prompts, provenance
from sglang_er.rollout.client import Client
from sglang_er.rollout.measure import PLAIN, jobs_of, run_jobs
from sglang_er.rollout.progress import Progress

STEPS = 6
Cell = tuple[int, int, str]  # batch, gamma, mode


def spent(before: Mapping[str, Any], after: Mapping[str, Any], count: str) -> float:
    """Mean seconds of what happened between two readings of one counter; nan if nothing did."""
    steps = after.get(count, 0) - before.get(count, 0)
    return float((after["seconds"] - before.get("seconds", 0.0)) / steps) if steps else float("nan")


def measured(client: Client, requests: list[prompts.Request], gamma: int) -> Iterator[tuple[Cell, float]]:
    """The passes of a batch of all these requests, in milliseconds."""
    size = len(requests)
    before = client.state()["steps"]
    policy = {"policy": "fixed", "gamma": gamma} if gamma else dict(PLAIN)
    # The last tokens of a response are drafted with less; nobody accepts more than all.
    run_jobs(client, policy, jobs_of(client, requests, 1.0, tokens=(STEPS - 1) * (gamma + 1)), size)
    after = client.state()["steps"]
    costs = [steps["costs"].get(str(size), {}).get(str(gamma), {}) for steps in (before, after)]
    if not costs[1]:
        return
    step = spent(*costs, "steps")
    if not gamma:
        yield (size, 0, "target_decode"), 1e3 * step
        return
    draft = spent(*(steps["draft_costs"].get(str(size), {}) for steps in (before, after)), "forwards")
    yield (size, gamma, "drafter_decode"), 1e3 * draft
    yield (size, gamma, "target_verify"), 1e3 * (step - gamma * draft)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b", choices=("0.5b", "1.5b"))
    parser.add_argument("--batches", default="1,2,4,8,16", metavar="B,...")
    parser.add_argument("--gammas", default="0,1,2,3,5,7", metavar="G,...")
    parser.add_argument("--input", type=int, default=96, metavar="N", help="prompt tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    batches, gammas = ([int(part) for part in text.split(",")] for text in (args.batches, args.gammas))
    progress = Progress(sys.stderr)
    model = cached_model(args.shape, "qwen3", progress)
    port = launcher.choose_port(None)
    flags = ["--speculative-algorithm", "EFFICIENT_ROLLOUT", "--er-gamma-max", str(max(gammas))]
    cells: dict[Cell, list[float]] = defaultdict(list)
    before = machine.look()
    with launcher.running_server(model, port, cache_dir() / "logs" / f"sweep-{port}.log", flags) as server:
        requests = prompts.make_requests([1] * max(batches), args.input, task_text=True, seed=0)
        run_jobs(server.client, dict(PLAIN), jobs_of(server.client, requests, 1.0, tokens=2), max(batches))
        for number in range(args.rounds):
            for size in batches:
                progress.update(f"round {number + 1} of {args.rounds}: {size} requests")
                for gamma in gammas:
                    for cell, milliseconds in measured(server.client, requests[:size], gamma):
                        cells[cell].append(milliseconds)
    about, facts = provenance.provenance(), provenance.machine_facts(before, machine.look())
    lines = [f"# {about['date'][:10]}, {facts['cpu']}, {facts['cores']} cores, {args.shape}, commit {about['commit']}"]
    lines += [f"# scripts/record_sweep.py, {args.rounds} rounds, load {facts['load_before']} to {facts['load_after']}"]
    lines.append("batch,seq,gamma,mode,median_ms")
    for (size, gamma, mode), found in sorted(cells.items()):
        lines.append(f"{size},{args.input},{gamma},{mode},{median(found):.2f}")
    args.csv.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
