"""`sglang-er bench rollout`: a closed-loop client against one server, its own or one that runs already."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_er.cli.common import cache_dir, cached_model, card_of, check_checkpoint, check_folder, exit_code, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_er.rollout.bench import Result, Settings
    from sglang_er.rollout.client import Client
    from sglang_er.rollout.machine import Machine
    from sglang_er.rollout.progress import Progress
    from sglang_er.rollout.prompts import Request

LONG_TAIL = "longtail"
# Without a choice: a batch of one and 128 tokens each way, or the whole batch of a length file.
DEFAULT_TOKENS = 128
DEFAULT_BLOCKS = 20
SAMPLE_SECONDS = 0.3
KV_AT_LEAST = 8192
# Slots that the engine reserves for a request beyond its tokens.
KV_RESERVE = 64


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server is measured; `bench policies` has the same choice."""
    from sglang_er.models.make import ARCHITECTURES, SHAPES

    server = parser.add_argument_group("the server, one of")
    server.add_argument("--url", metavar="URL", help="a server that runs, with EFFICIENT_ROLLOUT")
    server.add_argument("--model-path", type=Path, metavar="DIR", help="a checkpoint to start a server on")
    server.add_argument("--shape", choices=[s for s in SHAPES if s != "flat"], help="made and cached (default: 0.5b)")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="qwen3", help="of --shape (default: %(default)s)")
    parser.add_argument("--target-alpha", type=float, metavar="A", help="of --shape: acceptance of a W4 draft")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the started server (default: as `serve`)")
    parser.add_argument("--port", type=int, metavar="P", help="of the started server (default: a free one)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    add_server_arguments(parser)
    work = parser.add_argument_group("the work")
    work.add_argument("--batch", type=int, metavar="B", help="requests in flight (default: 1; all of a length file's)")
    work.add_argument("--input", type=int, default=DEFAULT_TOKENS, metavar="N", help="prompt tokens (%(default)s)")
    work.add_argument("--output", type=int, metavar="N", help=f"response tokens ({DEFAULT_TOKENS})")
    work.add_argument("--lengths", metavar="FILE", help=f"response lengths; `{LONG_TAIL}`: the committed file")
    work.add_argument("--requests", type=int, metavar="N", help="per block (default: --batch; all of a length file's)")
    work.add_argument("--seeds", type=int, metavar="S", help="sets of requests (default: 1; 10 of a length file's)")
    work.add_argument("--blocks", type=int, metavar="N", help=f"in all ({DEFAULT_BLOCKS}; a pair for every seed)")
    work.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s")
    work.add_argument("--cold", action="store_true", help="empty the prefix cache before every block")
    work.add_argument("--no-probe", action="store_true", help="no costs and no oracle for a length file")

    policy = parser.add_argument_group("the policy that is measured (default: the server's own)")
    policy.add_argument("--policy", metavar="NAME", help="as POST /er/policy takes it")
    policy.add_argument("--gamma", type=int, metavar="G", help="with policy fixed, which it implies")
    policy.add_argument("--thresholds", metavar="B:G,...", help="with policy threshold, which it implies")

    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the pair with the median speed-up over time")


def run(args: argparse.Namespace) -> int:
    """0 if it was measured, 1 if the server failed, 2 for a choice that cannot be, 130 on Ctrl-C."""
    from sglang_er.rollout.progress import Progress

    progress = Progress(sys.stderr)
    return exit_code("bench rollout", progress, lambda: _measure(args, progress))


def policy_changes(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say about the policy, for POST /er/policy."""
    if args.gamma is not None and args.thresholds is not None:
        raise ValueError("--gamma and --thresholds exclude each other")
    changes = {"policy": args.policy, "gamma": args.gamma, "thresholds": args.thresholds}
    if args.policy is None:
        changes["policy"] = "fixed" if args.gamma is not None else "threshold" if args.thresholds is not None else None
    return {name: value for name, value in changes.items() if value is not None}


def output_lengths(args: argparse.Namespace) -> list[list[int]]:
    """Response lengths of every seed's requests. Raises ValueError for numbers that cannot be."""
    from sglang_er.rollout import lengths

    for name in ("batch", "input", "output", "requests", "seeds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {args.temperature}")
    if args.blocks is not None and (args.blocks < 2 or args.blocks % 2):
        raise ValueError(f"--blocks counts plain and speculative blocks: an even number, got {args.blocks}")
    if args.lengths is None:
        return [[args.output or DEFAULT_TOKENS] * (args.requests or args.batch or 1)] * (args.seeds or 1)
    if args.output is not None:
        raise ValueError("--output and --lengths exclude each other")
    batches = lengths.load(None if args.lengths == LONG_TAIL else Path(args.lengths))
    seeds = len(batches) if args.seeds is None else args.seeds
    if seeds > len(batches):
        raise ValueError(f"--seeds {seeds}: {args.lengths} has {len(batches)} batches")
    if args.requests is not None and args.requests > min(map(len, batches)):
        raise ValueError(f"--requests {args.requests}: {args.lengths} has {min(map(len, batches))} lengths a batch")
    return [batch[: args.requests] for batch in batches[:seeds]]


def kv_tokens(outputs: Sequence[Sequence[int]], input_tokens: int, at_once: int) -> int:
    """KV slots that the largest batch needs, with its prompts and the responses of the block before it."""
    most = 0
    for batch in outputs:
        running = sorted(batch, reverse=True)[:at_once]
        most = max(most, 2 * sum(input_tokens + length + KV_RESERVE for length in running) + input_tokens * len(batch))
    return max(KV_AT_LEAST, -(-most // 1024) * 1024)


def _measure(args: argparse.Namespace, progress: Progress) -> None:
    from sglang_er.rollout import bench, machine, prompts, timeline

    if args.png is not None:
        timeline.require_plotting()
    check_folder(args.json, args.png)
    outputs, changes = output_lengths(args), policy_changes(args)
    at_once = args.batch or max(map(len, outputs)) if args.lengths else args.batch or 1
    with bench_server(args, progress, kv_tokens(outputs, args.input, at_once)) as (client, card, cpu_clock):
        text = prompts.knows_the_task(card)
        requests = [prompts.make_requests(batch, args.input, text, seed) for seed, batch in enumerate(outputs)]
        settings = _settings(args, requests, at_once, bench.policy_of(client.state(), changes))
        before = machine.look()
        result = bench.measure_rollouts(client, settings, teller(progress), cpu_clock)
        about = about_run(before, client.state(), card, text)
    _write(args, result, about)


def _settings(
    args: argparse.Namespace, requests: list[list[Request]], at_once: int, policy: Mapping[str, Any]
) -> Settings:
    from sglang_er.rollout.bench import Settings

    return Settings(
        batches=requests,
        at_once=at_once,
        blocks=args.blocks or (2 * len(requests) if args.lengths else DEFAULT_BLOCKS),
        temperature=args.temperature,
        policy=policy,
        cold=args.cold,
        probe=args.lengths is not None and not args.no_probe,
        sample_seconds=SAMPLE_SECONDS if args.png or args.json else 0.0,
    )


def teller(progress: Progress) -> Callable[[str, str, bool], None]:
    def tell(block: str, text: str, done: bool) -> None:
        (progress.note if done else progress.update)(f"{block}: {text}")

    return tell


def about_run(before: Machine, state: Mapping[str, Any], card: Mapping[str, Any], task_text: bool) -> dict[str, Any]:
    """Where a result comes from: command, commit, machine, model. `before`: the machine at the beginning; `state`: of
    the server at the end."""
    from sglang_er.rollout import machine, provenance

    threads = state["config"]["values"]["cpu_threads"]
    return {
        **provenance.provenance(),
        "machine": {**provenance.machine_facts(before, machine.look()), "server_threads": threads},
        "model": {
            "name": model_name(card),
            "alpha_stated": card.get("alpha"),
            "prompts": "task text" if task_text else "random token ids",
        },
    }


def model_name(card: Mapping[str, Any]) -> str:
    if not card:
        return "without a card of this project"
    return f"{card.get('arch')} {card.get('shape')}, layer sizes of {card.get('sizes_of')}"


@contextmanager
def bench_server(
    args: argparse.Namespace, progress: Progress, kv: int
) -> Iterator[tuple[Client, dict[str, Any], Callable[[], float]]]:
    """A client of the server, its model's card, and a clock of its processor time."""
    from sglang_er.rollout import launcher
    from sglang_er.rollout.client import Client

    if sum(choice is not None for choice in (args.url, args.model_path, args.shape)) > 1:
        raise ValueError("--url, --model-path and --shape exclude each other")
    if args.url is not None:
        client = Client(args.url.rstrip("/"))
        yield client, card_of(Path(client.model_path())), lambda: 0.0
        return
    model = args.model_path or cached_model(args.shape or "0.5b", args.arch, progress, args.target_alpha)
    check_checkpoint(model)
    port = launcher.choose_port(args.port)
    flags = ["--speculative-algorithm", "EFFICIENT_ROLLOUT", "--max-total-tokens", str(kv)]
    if args.threads is not None:
        flags += ["--er-cpu-threads", str(args.threads)]
    log = cache_dir() / "logs" / f"bench-{port}.log"
    progress.note(f"starting the server: sglang-er serve --model-path {model} --port {port} {' '.join(flags)}")
    with launcher.running_server(
        model, port, log, flags, lambda seconds: progress.update(f"the server starts, {seconds:.0f} s")
    ) as server:
        yield server.client, card_of(model), server.cpu_seconds
    log.unlink(missing_ok=True)  # kept where something went wrong


def _write(args: argparse.Namespace, result: Result, about: Mapping[str, Any]) -> None:
    from sglang_er.rollout import bench_report, timeline

    print(bench_report.text(result, about))
    if args.json is not None:
        write_json(args.json, bench_report.to_json(result, about))
    if args.png is not None:
        pair = bench_report.typical_pair(result)
        title = f"{about['model']['name']}: pair {pair + 1}, {result.comparison.speed_ups[pair]:.2f}x"
        timeline.draw(args.png, result.timelines[pair], title)
