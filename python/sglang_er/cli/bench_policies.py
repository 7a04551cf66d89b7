"""`sglang-er bench policies`: which draft-length policy is fastest on a workload, all of them in one server in turn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_er.cli import bench_rollout
from sglang_er.cli.common import check_folder, exit_code, write_json

if TYPE_CHECKING:
    from sglang_er.rollout.contest import Contest
    from sglang_er.rollout.measure import Block
    from sglang_er.rollout.progress import Progress

DEFAULT_ARMS = "goodput,threshold,fixed:1,fixed:3,fixed:5"
DEFAULT_ROUNDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    bench_rollout.add_server_arguments(parser)
    work = parser.add_argument_group("the work")
    work.add_argument("--batch", type=int, metavar="B", help="requests in flight (default: all of a round)")
    work.add_argument("--input", type=int, default=128, metavar="N", help="prompt tokens (%(default)s)")
    work.add_argument("--output", type=int, metavar="N", help="response tokens, all alike (128)")
    work.add_argument("--lengths", metavar="FILE", help=f"response lengths; `{bench_rollout.LONG_TAIL}`: the committed")
    work.add_argument("--requests", type=int, metavar="N", help="per round (default: --batch; all of a length file's)")
    work.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, metavar="R", help="every policy once in each (10)")
    work.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s")
    parser.add_argument(
        "--arms",
        default=DEFAULT_ARMS,
        metavar="P,...",
        help="goodput, threshold, fixed:G, each with +option=value, beside plain decode (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")


def run(args: argparse.Namespace) -> int:
    """0 if it was measured, 1 if the server failed, 2 for a choice that cannot be, 130 on Ctrl-C."""
    from sglang_er.rollout.progress import Progress

    progress = Progress(sys.stderr)
    return exit_code("bench policies", progress, lambda: _measure(args, progress))


def _measure(args: argparse.Namespace, progress: Progress) -> None:
    from sglang_er.rollout import contest, machine, prompts

    check_folder(args.json)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    arms = contest.parse_arms(args.arms)
    args.seeds = args.blocks = None
    outputs = bench_rollout.output_lengths(args)
    at_once = args.batch or max(map(len, outputs))
    kv = bench_rollout.kv_tokens(outputs, args.input, at_once)
    with bench_rollout.bench_server(args, progress, kv) as (client, card, cpu_clock):
        text = prompts.knows_the_task(card)
        batches = [prompts.make_requests(batch, args.input, text, seed) for seed, batch in enumerate(outputs)]
        rounds = [batches[number % len(batches)] for number in range(args.rounds)]
        plan = contest.Contest(arms, rounds, at_once, args.temperature)
        before = machine.look()
        blocks = contest.run(client, plan, bench_rollout.teller(progress), cpu_clock)
        state = client.state()
        about = bench_rollout.about_run(before, state, card, text)
    print(text_of(plan, blocks, about))
    if args.json is not None:
        found = {"what": "policies", **about, **contest.to_json(plan, blocks), "controller": state["controller"]}
        write_json(args.json, found)


def text_of(plan: Contest, blocks: Mapping[str, list[Block]], about: Mapping[str, Any]) -> str:
    """What the user reads."""
    from sglang_er.rollout import contest, report

    rows = [("", "tokens/s, median", "over plain [95 %]", "accept length", "steps by gamma")]
    for name, arm_blocks in blocks.items():
        steps = report.all_steps(arm_blocks)
        rows.append(
            (
                name,
                f"{report.median_rate(arm_blocks):.2f}",
                contest.speed_up(blocks, name).text(),
                report.number(steps.accept_length),
                report.histogram(steps),
            )
        )
    lines = [
        f"model      {about['model']['name']}; alpha stated by its card {about['model']['alpha_stated']}",
        report.machine_line(about),
        f"workload   {plan.at_once} in flight, {len(plan.rounds)} rounds of {len(plan.rounds[0])} requests",
        report.origin_line(about),
        "",
        *report.table(rows),
    ]
    return "\n".join(lines)
