"""`sglang-er simulate`: replays rollouts over known step costs, for several policies; table and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_er.cli import cost_source
from sglang_er.cli.common import check_folder, write_json

if TYPE_CHECKING:
    from sglang_er.policy.paper import Roofline
    from sglang_er.rollout.costs import StepTable
    from sglang_er.rollout.experiment import Plan
    from sglang_er.rollout.simulated_policies import PolicyOptions

DEFAULT_LENGTHS = "lognormal:661,1,8192"
DEFAULT_CONTEXT = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    cost_source.add_arguments(parser)
    work = parser.add_argument_group("the work")
    work.add_argument(
        "--lengths",
        default=DEFAULT_LENGTHS,
        metavar="SPEC",
        help="a length file, longtail (the committed one), or lognormal:MEAN,SIGMA,CAP[,SHARE]; SHARE of the responses "
        "run into CAP (default: %(default)s)",
    )
    work.add_argument("--requests", type=int, metavar="N", help="per rollout (default: 128, or a length file's batch)")
    work.add_argument("--prompt", type=int, default=256, metavar="N", help="prompt tokens (default: %(default)s)")
    work.add_argument(
        "--arrivals",
        default="closed",
        metavar="SPEC",
        help="closed, open:RATE (per second), turns:K, or waves:K,LEFT: K batches, the next when LEFT are left "
        "(default: %(default)s)",
    )
    work.add_argument("--think-seconds", type=float, default=5.0, metavar="S", help="mean, between turns (%(default)s)")
    work.add_argument("--turn-tokens", type=int, default=128, metavar="N", help="new in every turn (%(default)s)")
    work.add_argument("--seeds", type=int, default=20, metavar="N", help="default: %(default)s")
    work.add_argument("--rollouts", type=int, default=1, metavar="N", help="in a row, weights updated between (1)")

    chance = parser.add_argument_group("acceptance")
    chance.add_argument("--alpha", default="0.95", metavar="A|FILE", help="mean, or a JSON list (default: %(default)s)")
    chance.add_argument(
        "--alpha-concentration", type=float, default=50.0, metavar="C", help="of requests, 0: all alike (%(default)s)"
    )
    chance.add_argument("--alpha-decay", type=float, default=0.0, metavar="D", help="per 1000 tokens of a response (0)")
    chance.add_argument("--alpha-offset-decay", type=float, default=0.0, metavar="D", help="per offset in a draft (0)")
    chance.add_argument("--alpha-change", metavar="A@F", help="another mean after a fraction F of all tokens")

    engine = parser.add_argument_group("the engine")
    engine.add_argument("--max-running", type=int, metavar="N", help="requests at once (default: what the costs know)")
    engine.add_argument("--prefill-tokens-per-second", type=float, metavar="R", help="default: prefill takes no time")
    engine.add_argument("--late", type=int, default=1, metavar="N", help="steps until an outcome is told (%(default)s)")
    engine.add_argument("--noise", type=float, default=0.02, metavar="X", help="of measured times (%(default)s)")
    engine.add_argument("--outliers", type=float, default=0.01, metavar="X", help="share of steps at 3x (%(default)s)")
    engine.add_argument("--whole-steps", action="store_true", help="draft passes are not timed apart, as on a GPU")

    policy = parser.add_argument_group("the policies")
    policy.add_argument(
        "--policy",
        default="threshold",
        metavar="P,...",
        help="of fixed:G, threshold, paper, goodput, goodput:makespan; ar and oracle run always (default: %(default)s)",
    )
    policy.add_argument("--thresholds", metavar="B:G,...", help="of threshold (default: the configuration's)")
    policy.add_argument("--unseeded", action="store_true", help="goodput begins without timed forwards")
    policy.add_argument(
        "--seed-error", type=float, metavar="X", help="these forwards timed the draft pass X times too long (1)"
    )
    policy.add_argument("--paper-constants", type=Path, metavar="FILE", help="roofline of paper (default: the sweep's)")
    policy.add_argument("--paper-gamma", type=int, default=7, metavar="G", help="its first rung (%(default)s)")
    policy.add_argument("--paper-ramp", type=int, default=32, metavar="B", help="its ramp guard (%(default)s)")

    parser.add_argument(
        "--context", type=int, default=DEFAULT_CONTEXT, metavar="N", help="of the last table (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")


def run(args: argparse.Namespace) -> int:
    """0, or 2 with one line on stderr for a choice that cannot be. What a policy raises is not caught."""
    from sglang_er.rollout import experiment, provenance, simulate_report
    from sglang_er.rollout.progress import Progress

    try:
        check_folder(args.json)
        plan = make_plan(args)
        experiment.check(plan)
    except (ValueError, OSError) as error:
        print(f"sglang-er simulate: {error}", file=sys.stderr)
        return 2
    progress = Progress(sys.stderr)
    try:
        samples = experiment.run(plan, progress.update)
    finally:
        progress.close()
    gains = simulate_report.gains_of(plan, args.context)
    print(simulate_report.text(plan, samples, gains))
    if args.json is not None:
        write_json(args.json, simulate_report.to_json(plan, samples, gains, provenance.provenance()))
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Raises ValueError or OSError in one line."""
    from sglang_er.rollout import acceptance_process, arrivals
    from sglang_er.rollout.experiment import Plan
    from sglang_er.rollout.simulate import Engine

    _check(args)
    table = cost_source.step_table(args)
    batch_max = table.costs.batch_max
    if args.max_running is not None and args.max_running > batch_max:
        raise ValueError(f"--max-running {args.max_running}: {table.costs.name} reaches batches of {batch_max}")
    return Plan(
        table=table,
        lengths=arrivals.parse_lengths(args.lengths),
        requests=args.requests,
        prompt=args.prompt,
        arrivals=arrivals.parse_arrivals(args.arrivals, args.think_seconds, args.turn_tokens),
        acceptance=acceptance_process.Acceptance(
            acceptance_process.parse_alpha(args.alpha),
            args.alpha_concentration,
            args.alpha_decay,
            args.alpha_offset_decay,
            None if args.alpha_change is None else acceptance_process.parse_change(args.alpha_change),
        ),
        engine=Engine(
            max_running=args.max_running or batch_max,
            prefill_rate=args.prefill_tokens_per_second,
            late=args.late,
            noise=args.noise,
            outliers=args.outliers,
            split=not args.whole_steps,
        ),
        options=_policy_options(args, table),
        policies=[name for name in args.policy.split(",") if name],
        seeds=args.seeds,
        rollouts=args.rollouts,
    )


def _check(args: argparse.Namespace) -> None:
    for name in ("requests", "seeds", "rollouts", "max_running", "context"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("prompt", "late"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(args, name)}")
    for name in ("noise", "outliers"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(args, name):g}")
    rate = args.prefill_tokens_per_second
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"--prefill-tokens-per-second must be above 0, got {rate:g}")
    if args.seed_error is not None:
        if args.unseeded:
            raise ValueError("--seed-error: with --unseeded no forwards are timed")
        if not 0 < args.seed_error < float("inf"):
            raise ValueError(f"--seed-error must be above 0, got {args.seed_error:g}")


def _policy_options(args: argparse.Namespace, table: StepTable) -> PolicyOptions:
    from sglang_er.config import DEFAULT_THRESHOLDS
    from sglang_er.rollout.simulated_policies import PolicyOptions

    thresholds = DEFAULT_THRESHOLDS if args.thresholds is None else _thresholds(args.thresholds)
    return PolicyOptions(
        gamma_max=table.gamma_max,
        seed_from=None if args.unseeded else table,
        seed_error=1.0 if args.seed_error is None else args.seed_error,
        thresholds=thresholds,
        roofline=_paper_constants(args, table),
        paper_gamma=args.paper_gamma,
        paper_ramp=args.paper_ramp,
    )


def _thresholds(text: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = [part.split(":") for part in text.split(",")]
        found = tuple((int(batch), int(gamma)) for batch, gamma in pairs)
    except ValueError:
        raise ValueError(f"--thresholds {text}: must be BATCH:GAMMA,...") from None
    batches = [batch for batch, _ in found]
    if batches != sorted(set(batches)) or batches[0] < 1 or min(gamma for _, gamma in found) < 0:
        raise ValueError(f"--thresholds {text}: batch sizes must rise, draft lengths must be at least 0")
    return found


def _paper_constants(args: argparse.Namespace, table: StepTable) -> Roofline | None:
    """Those of the file, of the sweep that came with the package, or of the preset; None where there are none."""
    from sglang_er.policy.paper import Roofline
    from sglang_er.rollout import roofline

    if args.paper_constants is not None:
        try:
            return Roofline.from_json(json.loads(args.paper_constants.read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"--paper-constants {args.paper_constants}: {error}") from None
    if isinstance(table.costs, roofline.RooflineCosts):
        return table.costs.paper_constants()
    return roofline.published_constants(args.sweep)
