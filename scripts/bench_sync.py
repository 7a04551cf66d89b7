#!/usr/bin/env python3
"""What a weight update costs: remaking the twin against reading every weight once, and the pause that a trainer sees
against that of the same server without speculation.

    python scripts/bench_sync.py requantize --json bench/cpu/sync/requantize_0.5b.json    # asked: within 2x
    python scripts/bench_sync.py pause --json bench/cpu/sync/pause_0.5b.json              # asked: 5 % over plain

`requantize`: the twin of the shape's layers is remade as at an update, in turns with readings of the memory's
bandwidth, in one process. `pause`: two servers, plain (`serve --plain`: SGLang 0.5.21 alone does not run on most CPUs)
and ours, take turns, and who goes first turns every round. A round is what a trainer does: pause, flush, update,
continue, one request. The clock starts at the pause. Tensors are put into shared memory before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests
import torch

from sglang_er import kernels
from sglang_er.bench import linear
from sglang_er.bench.kernels import layers_of
from sglang_er.bench.stream import Stream
from sglang_er.bench.timing import Timing
from sglang_er.cli.common import cache_dir, cached_model, write_json
from sglang_er.models.sizes import public_size
from sglang_er.rollout import cores, launcher, machine, prompts, provenance
from sglang_er.rollout.client import REQUEST_TIMEOUT_S, Client
from sglang_er.rollout.conformance.sender import buckets_of
from sglang_er.rollout.intervals import Interval, median_interval
from sglang_er.rollout.progress import Progress
from sglang_er.twin.packed_linear import PackedLinear
from sglang_er.twin.row_samples import RowSamples
from sglang_er.twin.twin import Twin

INPUT, TOKENS, GAMMA = 128, 8, 3
DRAFTING = {"policy": "fixed", "gamma": GAMMA}
SERVERS = {"plain": ["--plain"], "ours": ["--speculative-algorithm", "EFFICIENT_ROLLOUT"]}
KINDS = ("disk", "tensor")


# -- requantization against reading -------------------------------------------------------------------------------


def make_twin(layers: Sequence[linear.Layer]) -> tuple[Twin, int]:
    """The twin of random bf16 weights, each layer as often as the model has it, and the bytes of these weights."""
    twin, nbytes = Twin(), 0
    for layer in layers:
        generator = torch.Generator().manual_seed(layer.rows * 31 + layer.cols)
        first = torch.randn(layer.rows, layer.cols, generator=generator).mul_(0.02).bfloat16()
        for copy in range(layer.count):
            weight = first.clone() if copy else first
            nbytes += weight.nbytes
            twin.layers.append(PackedLinear(layer.name, partial(_same, weight), linear.GROUP_SIZE))
    return twin, nbytes


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def by_layer(twin: Twin) -> dict[str, float]:
    """Seconds of one pass over the layers of each name."""
    spent = dict.fromkeys((layer.name for layer in twin.layers), 0.0)
    for layer in twin.layers:
        spent[layer.name] += timed(layer.repack)
    return spent


def requantize(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    layers = layers_of(public_size("qwen3", args.shape).shape)
    twin, nbytes = make_twin(layers)
    samples, stream = RowSamples(twin.layers), Stream()
    reading = Timing(repeats=3, calls=2)
    packs, takes, reads, parts = [], [], [], []
    with torch.inference_mode():
        samples.take()
        for number in range(args.rounds + 1):
            progress.update(f"round {number} of {args.rounds}")
            # Before and after: a disturbance of a second should not hit one side alone.
            before = stream.rate(reading.seconds(stream.readers()))
            pack, take = timed(twin.requantize), timed(samples.take)
            after = stream.rate(reading.seconds(stream.readers()))
            if number:  # the first round warms up
                packs.append(pack)
                takes.append(take)
                reads.append(2 * nbytes / (before + after))
                parts.append(by_layer(twin))
        tiny = make_twin([linear.Layer("tiny", 16, linear.GROUP_SIZE, 1000)])[0]
        call = statistics.median(timed(tiny.requantize) / 1000 for _ in range(20))
    ratios = [(pack + take) / read for pack, take, read in zip(packs, takes, reads)]
    written = sum(layer.nbytes for layer in twin.layers)
    found = {
        "bytes_read": nbytes,
        "bytes_written": written,
        "read_once_seconds": figures(median_interval(reads)),
        "requantize_seconds": figures(median_interval(packs)),
        "row_samples_seconds": figures(median_interval(takes)),
        "over_reading": figures(median_interval(ratios)),
        "by_layer_seconds": short({name: statistics.median(part[name] for part in parts) for name in parts[0]}),
        "calls": len(twin.layers),
        "call_seconds": call,
        "threads": torch.get_num_threads(),
        "isa": kernels.isa(),
        "rounds": [short({"requantize": p, "row_samples": t, "read": r}) for p, t, r in zip(packs, takes, reads)],
    }
    print(f"twin of {args.shape}: {nbytes / 1e9:.2f} GB of weights, {written / 1e9:.2f} GB packed, {kernels.isa()}")
    print(f"reading them once {1e3 * statistics.median(reads):.1f} ms, requantization with row samples", end=" ")
    print(f"{1e3 * statistics.median(map(sum, zip(packs, takes))):.1f} ms: {median_interval(ratios).text()} times (2)")
    return found


# -- the pause that a trainer sees --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pause:
    """Seconds since the pause: when the update had been taken, at the first token, at the last of TOKENS; and what
    remaking the twin took of them."""

    updated: float
    first: float
    last: float
    requantize: float = 0.0


def post(client: Client, path: str, body: dict[str, Any]) -> None:
    reply = client.send("POST", path, body)
    if reply.status_code != 200:
        raise RuntimeError(f"{path}: {reply.status_code} {reply.text[:300]}")


@contextmanager
def prepared(kind: str, model: Path) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The calls of an update; tensors lie in shared memory until the end of the block."""
    if kind == "disk":
        yield [("/update_weights_from_disk", {"model_path": str(model)})]
        return
    from sglang_er.engine.weight_sender import WeightSender

    calls: list[tuple[str, dict[str, Any]]] = [("/begin_weight_update", {})]
    senders = []
    for bucket in buckets_of(model):
        senders.append(WeightSender())
        body = {"serialized_named_tensors": [senders[-1].bucket(bucket)], "load_format": "flattened_bucket"}
        calls.append(("/update_weights_from_tensor", {**body, "flush_cache": False}))
    yield [*calls, ("/end_weight_update", {})]


def arrivals(client: Client, request: prompts.Request) -> tuple[float, float]:
    """The clock at the first token of a streamed response, and at its last."""
    body = {"input_ids": list(request.input_ids), "sampling_params": request.sampling(0.0), "stream": True}
    first, last, tokens = 0.0, 0.0, 0
    with requests.post(client.url + "/generate", json=body, stream=True, timeout=REQUEST_TIMEOUT_S) as reply:
        for line in reply.iter_lines():
            if line.startswith(b"data: {"):
                last, tokens = time.perf_counter(), json.loads(line[6:])["meta_info"]["completion_tokens"]
                first = first or last
    if tokens != request.output_tokens:
        raise RuntimeError(f"{tokens} of {request.output_tokens} tokens came")
    return first, last


def spent_on_twin(client: Client, arm: str) -> float:
    return float(client.state()["twin"]["requantize_seconds"]) if arm == "ours" else 0.0


def pause_once(client: Client, arm: str, kind: str, model: Path, request: prompts.Request) -> Pause:
    with prepared(kind, model) as calls:
        before = spent_on_twin(client, arm)
        began = time.perf_counter()
        post(client, "/pause_generation", {})
        client.flush_cache()
        for path, body in calls:
            post(client, path, body)
        post(client, "/continue_generation", {})
        updated = time.perf_counter()
        first, last = arrivals(client, request)
    return Pause(updated - began, first - began, last - began, spent_on_twin(client, arm) - before)


def pause(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    model = cached_model(args.shape, "qwen3", progress)
    asked = prompts.make_requests([TOKENS] * (args.rounds + 1), INPUT, task_text=True, seed=0)
    seen: dict[str, dict[str, list[Pause]]] = {kind: {arm: [] for arm in SERVERS} for kind in args.kinds}
    with ExitStack() as stack:
        clients = {}
        for arm, flags in SERVERS.items():
            progress.note(f"starting the server `{arm}`")
            port = launcher.choose_port(None)
            flags = [*flags, "--max-total-tokens", "8192", "--er-cpu-threads", str(args.threads)]
            log = cache_dir() / "logs" / f"sync-{port}.log"
            clients[arm] = stack.enter_context(launcher.running_server(model, port, log, flags)).client
        clients["ours"].set_policy(DRAFTING)
        for number, request in enumerate(asked):
            for kind in args.kinds:
                for arm in list(SERVERS)[:: 1 if number % 2 else -1]:
                    progress.update(f"round {number} of {args.rounds}: {kind}, {arm}")
                    found = pause_once(clients[arm], arm, kind, model, request)
                    if number:  # the first round warms up
                        seen[kind][arm].append(found)
    return {kind: judged(kind, seen[kind]["plain"], seen[kind]["ours"]) for kind in args.kinds} | {
        "server_threads": args.threads
    }


def judged(kind: str, plain: list[Pause], ours: list[Pause]) -> dict[str, Any]:
    pairs = list(zip(plain, ours, strict=True))
    shown = {
        "over_plain": median_interval([o.first / p.first for p, o in pairs]),
        "over_plain_without_requantization": median_interval([(o.first - o.requantize) / p.first for p, o in pairs]),
        "last_token_over_plain": median_interval([o.last / p.last for p, o in pairs]),
    }
    medians = {
        f"{arm}_{name}_seconds": statistics.median(getattr(one, name) for one in values)
        for arm, values in (("plain", plain), ("ours", ours))
        for name in ("updated", "first", "last")
    }
    medians["requantize_seconds"] = statistics.median(one.requantize for one in ours)
    print(
        f"{kind}: first token after {medians['plain_first_seconds']:.3f} s plain, "
        f"{medians['ours_first_seconds']:.3f} s ours, of which {medians['requantize_seconds']:.3f} s requantization"
    )
    for name, interval in shown.items():
        print(f"  {name.replace('_', ' '):34} {interval.text()}")
    rounds = [{"plain": short(vars(p)), "ours": short(vars(o))} for p, o in pairs]
    return {**short(medians), **{name: figures(interval) for name, interval in shown.items()}, "rounds": rounds}


# -- both ---------------------------------------------------------------------------------------------------------


def figures(interval: Interval) -> dict[str, float]:
    return short({"median": interval.median, "low": interval.low, "high": interval.high})


def short(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("requantize", "pause"))
    parser.add_argument("--shape", default="0.5b", choices=("0.5b", "1.5b"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=cores.default_threads())
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help="of pause: disk,tensor")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = machine.look()
    print(before.text())
    found = (requantize if args.part == "requantize" else pause)(args, Progress(sys.stderr))
    after = machine.look()
    print("load average after: " + " ".join(f"{value:.1f}" for value in after.load))
    if args.json is not None:
        about = provenance.provenance()
        about["command"] = " ".join(["python scripts/bench_sync.py", *sys.argv[1:]])
        facts = provenance.machine_facts(before, after)
        write_json(args.json, {"what": args.part, "shape": args.shape, **about, "machine": facts, **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
