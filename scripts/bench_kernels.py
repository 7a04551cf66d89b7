"""Times the CPU kernels against PyTorch's, all in one process, interleaved.

Weights rotate through more memory than the last-level cache holds, so that every call reads them from memory as a
decode step does; they are random, because constant data is cached and compressed differently. Every figure is the
median over repeats in which the candidates take turns: what disturbs the machine disturbs all of them. On a machine
that is busy all the time, `--threads 1 --clock cpu` counts the processor time of one thread instead, and
`--statistic fastest --calls 1 --repeats 500` finds the calls that nothing interrupted.

    python scripts/bench_kernels.py                      # the table of docs/kernels.md
    python scripts/bench_kernels.py --shape 896x4864 --batches 1,8 --isas avx512,avx2 --json out.json
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as functional

from sglang_er import kernels

GROUP_SIZE = 128
Run = Callable[[], object]


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": kernels.isa(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def rotate(runs: list[Run]) -> Run:
    """Calls the next of ``runs`` each time: same work on other memory."""
    state: Iterator[int] = iter(range(10**9))
    return lambda: runs[next(state) % len(runs)]()


def interleaved(candidates: dict[str, Run], args: argparse.Namespace, calls: int) -> dict[str, float]:
    """Median (or least) seconds per call; the candidates take turns, each turn is ``calls`` calls."""
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(args.repeats + 1):
        for name, run in candidates.items():
            begin = clock()
            for _ in range(calls):
                run()
            if repeat > 0:  # the first turn warms up
                times[name].append((clock() - begin) / calls)
    summary = min if args.statistic == "fastest" else statistics.median
    return {name: summary(values) for name, values in times.items()}


def bench_bandwidth(args: argparse.Namespace) -> dict[str, float]:
    """Bytes a second that reading 1 GiB reaches: what a linear op at M = 1 can be compared to."""
    memory = torch.zeros(1 << 30, dtype=torch.uint8)
    floats = memory.view(torch.float32)
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes, libc.memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    part = memory.nbytes // args.threads
    with ThreadPoolExecutor(args.threads) as pool:

        def search() -> object:  # for a byte that is not there: the C library's read loop
            if args.threads == 1:
                return libc.memchr(memory.data_ptr(), 1, part)
            starts = [memory.data_ptr() + i * part for i in range(args.threads)]
            return list(pool.map(lambda start: libc.memchr(start, 1, part), starts))

        candidates: dict[str, Run] = {"torch.sum": floats.sum, "memchr": search}
        medians = interleaved(candidates, args, 1)
    rates = {name: memory.nbytes / seconds / 1e9 for name, seconds in medians.items()}
    print("read bandwidth GB/s: " + "  ".join(f"{name} {rate:.1f}" for name, rate in rates.items()), flush=True)
    return rates


def linear_candidates(rows: int, cols: int, batch: int, footprint: int, isas: list[str]) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(rows * 31 + cols)
    x = torch.randn(batch, cols, generator=generator).bfloat16()
    copies = max(2, footprint // (rows * cols * 2))
    packed_copies = max(2, footprint * 2 // (rows * cols))  # same footprint with 4.25 bits a weight
    weight = torch.randn(rows, cols, generator=generator).mul_(0.02).bfloat16()
    weights = [weight.clone() for _ in range(copies)]
    packed = kernels.quantize_pack(weight, GROUP_SIZE)
    ours = [clone_packed(packed) for _ in range(packed_copies)]
    aten_packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (rows, cols), dtype=torch.int32, generator=generator), 2
    )
    scale_zero = torch.rand(cols // GROUP_SIZE, rows, 2, generator=generator).bfloat16()
    aten = [(aten_packed.clone(), scale_zero.clone()) for _ in range(packed_copies)]

    candidates: dict[str, Run] = {
        "F.linear bf16": rotate([partial(functional.linear, x, w) for w in weights]),
        "aten int4pack": rotate(
            [partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, w, GROUP_SIZE, s) for w, s in aten]
        ),
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        reordered = [torch.ops.mkldnn._reorder_linear_weight(w, batch) for w in weights]
        linear = torch.ops.mkldnn._linear_pointwise
        candidates["mkldnn prepacked bf16"] = rotate([partial(linear, x, w, None, "none", [], "") for w in reordered])
    for isa in isas:
        for name, runs in (
            ("bf16_linear", [partial(kernels.bf16_linear, x, w) for w in weights]),
            ("w4a16", [partial(kernels.w4a16_linear, x, w) for w in ours]),
            ("w4a8", [partial(kernels.w4a8_linear, x, w) for w in ours]),
        ):
            run = rotate(runs)

            def on_isa(run: Run = run, isa: str = isa) -> object:
                kernels.set_isa(isa)
                return run()

            candidates[f"{name} {isa}"] = on_isa if len(isas) > 1 else run
    return candidates


def clone_packed(weight: kernels.PackedWeight) -> kernels.PackedWeight:
    return kernels.PackedWeight(
        weight.packed.clone(), weight.scales_zeros.clone(), *weight.shape, weight.group_size, weight.dtype
    )


def bench_linear(args: argparse.Namespace, shape: tuple[int, int]) -> list[dict[str, object]]:
    rows, cols = shape
    results: list[dict[str, object]] = []
    for batch in args.batches:
        candidates = linear_candidates(rows, cols, batch, args.footprint << 20, args.isas)
        medians = interleaved(candidates, args, args.calls)
        results.append({"n": rows, "k": cols, "m": batch, "seconds": medians})
        cells = "  ".join(f"{name} {seconds * 1e6:8.0f}" for name, seconds in medians.items())
        print(f"{rows:6d}x{cols:<6d} M={batch:<3d} us: {cells}", flush=True)
    return results


def bench_quantize(args: argparse.Namespace, shape: tuple[int, int]) -> dict[str, object]:
    """Requantizing in place, and copying as much memory."""
    rows, cols = shape
    copies = max(2, (args.footprint << 20) // (rows * cols * 2))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, cols, generator=generator).bfloat16()
    weights = [weight.clone() for _ in range(copies)]
    outs = [kernels.quantize_pack(weight, GROUP_SIZE) for _ in range(copies)]
    target = [weight.clone() for _ in range(copies)]  # written once: no page faults in the timing
    candidates = {
        "quantize_pack": rotate([partial(kernels.quantize_pack, w, out=o) for w, o in zip(weights, outs)]),
        "copy": rotate([partial(t.copy_, w) for w, t in zip(weights, target)]),
    }
    medians = interleaved(candidates, args, args.calls)
    moved = {"quantize_pack": weight.nbytes + outs[0].nbytes, "copy": 2 * weight.nbytes}
    rates = {name: moved[name] / seconds / 1e9 for name, seconds in medians.items()}
    cells = "  ".join(f"{name} {medians[name] * 1e6:8.0f} us {rates[name]:5.1f} GB/s" for name in medians)
    print(f"{rows:6d}x{cols:<6d} {cells}  share of copy {rates['quantize_pack'] / rates['copy']:.2f}", flush=True)
    return {"n": rows, "k": cols, "seconds": medians, "gigabytes_per_second": rates}


def bench_overhead(args: argparse.Namespace) -> dict[str, float]:
    """A call on a weight so small that only the call itself is left."""
    weight = kernels.quantize_pack(torch.randn(16, 32, generator=torch.Generator().manual_seed(2)).bfloat16(), 32)
    x = torch.ones(1, 32).bfloat16()
    plain = torch.ones(16, 32).bfloat16()
    out = torch.empty(1, 16).bfloat16()
    candidates: dict[str, Run] = {
        "w4a16_linear": lambda: kernels.w4a16_linear(x, weight),
        "w4a8_linear": lambda: kernels.w4a8_linear(x, weight),
        "w4a16_linear, out given": lambda: kernels.w4a16_linear(x, weight, out=out),
        "bf16_linear": lambda: kernels.bf16_linear(x, plain),
        "F.linear": lambda: functional.linear(x, plain),
    }
    medians = interleaved(candidates, args, 2000)
    print("call overhead us: " + "  ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in medians.items()))
    return medians


def shape_of(text: str) -> tuple[int, int]:
    rows, cols = text.lower().split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape_of, action="append", help="NxK, repeatable")
    parser.add_argument(
        "--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8, 16]
    )
    parser.add_argument("--isas", type=lambda text: text.split(","), default=None, help="default: the active one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--statistic", choices=["median", "fastest"], default="median")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--calls", type=int, default=10, help="calls a turn")
    parser.add_argument("--footprint", type=int, default=400, help="MiB of weights that every candidate rotates over")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts one thread: add --threads 1")
    torch.set_num_threads(args.threads)
    args.isas = args.isas or [kernels.isa()]
    kernels.set_isa(args.isas[0])  # also the one of quantize_pack
    shapes = args.shape or [(4096, 4096), (1536, 8960), (896, 4864), (1152, 896)]

    report: dict[str, object] = {"machine": {**machine(), "clock": args.clock, "statistic": args.statistic}}
    print(report["machine"])
    with torch.inference_mode():
        report["read_bandwidth"] = bench_bandwidth(args)
        report["overhead"] = bench_overhead(args)
        report["quantize_pack"] = [bench_quantize(args, shape) for shape in shapes]
        report["linear"] = [row for shape in shapes for row in bench_linear(args, shape)]
    print("load average after:", os.getloadavg())
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
