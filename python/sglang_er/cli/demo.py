"""`sglang-er demo`: a real server, a batch of rollouts with and without speculation, and the table that comes of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_er.cli.common import cache_dir, cached_model, card_of, check_checkpoint, terminable

if TYPE_CHECKING:
    from sglang_er.rollout.client import Client
    from sglang_er.rollout.launcher import ServerProcess
    from sglang_er.rollout.progress import Progress
    from sglang_er.rollout.report import Report
    from sglang_er.rollout.workload import Rollout

DEFAULT_SHAPE = "0.5b"
DEFAULT_ARCH = "qwen3"
GREEDY_PROMPTS = 4
GREEDY_TOKENS = 48
PROBE_TOKENS = 8
# Two pairs are the fewest that say anything about the noise.
BLOCKS_AT_LEAST = 4
# The whole demo's KV cache; SGLang's own default would take gigabytes.
KV_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's options."""
    from sglang_er.models.make import ARCHITECTURES, SHAPES

    shapes = [shape for shape in SHAPES if shape != "flat"]
    parser.add_argument("--shape", choices=shapes, default=DEFAULT_SHAPE, help="default: %(default)s; tiny is fast")
    parser.add_argument("--arch", choices=ARCHITECTURES, default=DEFAULT_ARCH, help="default: %(default)s")
    parser.add_argument("--model-path", type=Path, metavar="DIR", help="a checkpoint of `make-model` to use instead")
    parser.add_argument("--rollouts", type=int, default=8, metavar="N", help="requests at once (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, metavar="N", help="most pairs of blocks (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=120.0, metavar="S", help="seconds for the pairs (default: %(default)s)"
    )
    parser.add_argument("--gamma", type=int, metavar="G", help="always draft G tokens (default: by batch size)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of the server (default: all cores, fewer if busy)"
    )
    parser.add_argument("--port", type=int, metavar="P", help="the server's port (default: a free one)")


def run(args: argparse.Namespace) -> int:
    """0 if all went well, 1 if the server failed or outputs are wrong, 2 for a choice that cannot be, 130 on Ctrl-C."""
    from sglang_er.rollout.errors import RolloutError
    from sglang_er.rollout.progress import Progress

    for name, value, least in (("--rollouts", args.rollouts, 1), ("--pairs", args.pairs, 1)):
        if value < least:
            return _fail(f"{name} must be at least {least}, got {value}", 2)
    progress = Progress()
    try:
        with terminable():
            report = _demonstrate(args, progress)
    except RolloutError as error:
        progress.close()
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        progress.close()
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        progress.close()
        return _fail("interrupted; the server is stopped", 130)
    print(f"\n{report.text()}")
    return 1 if report.equality.wrong else 0


def _fail(message: str, code: int) -> int:
    print(f"sglang-er demo: {message}", file=sys.stderr)
    return code


def _demonstrate(args: argparse.Namespace, progress: Progress) -> Report:
    from sglang_er.rollout import launcher, machine, workload

    workload.make_batch(args.rollouts)  # a wrong number should not cost a model first
    port = launcher.choose_port(args.port)
    model = args.model_path or cached_model(args.shape, args.arch, progress)
    check_checkpoint(model)
    flags = ["--speculative-algorithm", "EFFICIENT_ROLLOUT", "--max-total-tokens", str(KV_TOKENS)]
    threads = machine.fair_threads(machine.look()) if args.threads is None else args.threads
    if threads is not None:
        flags += ["--er-cpu-threads", str(threads)]
    log = cache_dir() / "logs" / f"demo-{port}.log"
    progress.note(f"starting the server: sglang-er serve --model-path {model} --port {port} {' '.join(flags)}")
    try:
        with launcher.running_server(
            model, port, log, flags, lambda seconds: progress.update(f"the server starts, {seconds:.0f} s")
        ) as server:
            report = _measure(args, model, server, progress)
    except KeyboardInterrupt:
        log.unlink(missing_ok=True)
        raise
    log.unlink(missing_ok=True)  # kept where something went wrong
    return report


def _measure(args: argparse.Namespace, model: Path, server: ServerProcess, progress: Progress) -> Report:
    from sglang_er.rollout import equality, machine, measure, report, workload

    client = server.client
    policy: Mapping[str, Any] = {"policy": "goodput"}
    if args.gamma is not None:
        policy = {"policy": "fixed", "gamma": args.gamma}
    progress.note("the server is up; a few tokens show how fast this machine is")
    batch = _fitting_batch(client, policy, args, progress)
    # Prompts of the same batch are in the prefix cache after the first block; then they are so for all blocks.
    measure.run_block(client, policy, workload.first_tokens(batch, 2))
    client.set_policy(policy)
    before = machine.look()
    chosen = report.policy_text(client.state()["policy"])

    def tell(block: str, text: str, done: bool) -> None:
        (progress.note if done else progress.update)(f"{block}: {text}")

    comparison = measure.compare(client, policy, batch, args.pairs, args.budget, tell, server.cpu_seconds)
    equal = equality.compare_greedy(
        client,
        policy,
        workload.greedy_prompts(GREEDY_PROMPTS),
        GREEDY_TOKENS,
        lambda text: progress.update(f"greedy outputs: {text}"),
    )
    progress.note("measured; stopping the server")
    card = card_of(model)
    name = f"{card.get('arch', 'unknown')} {card.get('shape', model.name)}, layer sizes of {card.get('sizes_of', '?')}"
    return report.Report(name, card.get("alpha"), before, chosen, batch, comparison, equal)


def _fitting_batch(
    client: Client, policy: Mapping[str, Any], args: argparse.Namespace, progress: Progress
) -> list[Rollout]:
    """The batch that this machine, now, decodes in the time for a block."""
    from sglang_er.rollout import measure, workload

    probe = workload.first_tokens(workload.make_batch(args.rollouts), PROBE_TOKENS)
    seconds = []
    # The first block warms up what is compiled or allocated at first use.
    for changes, rollouts in ((policy, probe), (measure.PLAIN, probe), (measure.PLAIN, probe[:1])):
        block = measure.run_block(client, changes, rollouts, on_progress=lambda text: progress.update(f"probe: {text}"))
        seconds.append(block.seconds / PROBE_TOKENS)
    return workload.batch_within(args.rollouts, seconds[2], seconds[1], args.budget / BLOCKS_AT_LEAST)
