"""Times paged_attention over a bf16 KV pool and over its int8 and int4 shadows against torch SDPA on gathered KV.

Requests rotate through a pool of which even the int4 shadow is larger than the last-level cache, so that every call
reads its context from memory as a decode step does. `read` is torch's maximum over the same bytes: about what this
machine reads at all. The candidates take turns (see bench_kernels.py); `--threads 1 --clock cpu` is for a busy machine.

    python scripts/bench_attention.py
    python scripts/bench_attention.py --contexts 8192 --queries 1,5 --heads 28x4x128 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
from bench_kernels import Run, interleaved, machine, rotate
from torch.nn.functional import scaled_dot_product_attention

from sglang_er import kernels
from sglang_er.kernels.kv_shadow import ShadowFormat


def shadow_of(keys: torch.Tensor, values: torch.Tensor, format: ShadowFormat) -> kernels.KvShadow:
    shadow = kernels.KvShadow.empty(*keys.shape, values.shape[2], format)
    kernels.kv_shadow_store(keys, values, torch.arange(len(keys)), shadow)
    return shadow


def sdpa(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """As engine/cpu/attention.py does without this kernel; the index matrix and the mask are not timed."""
    return scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[slots].transpose(0, 1)[None],
        values[slots].transpose(0, 1)[None],
        attn_mask=mask,
        enable_gqa=True,
    )


def candidates(context: int, queries: int, heads: tuple[int, int, int], footprint: int) -> dict[str, Run]:
    q_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(context)
    requests = max(2, footprint // (4 * context * kv_heads * dim))
    keys = torch.randn(context, kv_heads, dim, generator=generator).bfloat16().repeat(requests, 1, 1)
    values = torch.randn(context, kv_heads, dim, generator=generator).bfloat16().repeat(requests, 1, 1)
    table = torch.arange(requests * context, dtype=torch.int32).view(requests, context)
    q = torch.randn(queries, q_heads, dim, generator=generator).bfloat16()
    bounds, length = torch.tensor([0, queries]), torch.tensor([context])
    last = context - queries + torch.arange(queries)
    mask = None if queries == 1 else torch.arange(context) <= last[:, None]
    valid = torch.ones(len(keys), dtype=torch.uint8)

    def paged(request: int, shadow: kernels.KvShadow | None) -> Run:
        rows = torch.tensor([request])
        quantized = {} if shadow is None else {"shadow": shadow, "valid": valid, "exact_newest": 64}
        arguments = (q, keys, values, table, rows, bounds, length)
        return partial(kernels.paged_attention, *arguments, scale=dim**-0.5, **quantized)

    def read(request: int) -> Run:
        parts = [tensor.view(torch.int32).view(requests, -1)[request] for tensor in (keys, values)]
        return lambda: [part.max() for part in parts]

    everyone = range(requests)
    found = {"read": rotate([read(request) for request in everyone])}
    slots = table.long()
    found["sdpa"] = rotate([partial(sdpa, q, keys, values, slots[request], mask) for request in everyone])
    for name in ("bf16", "int8", "int4"):
        shadow = None if name == "bf16" else shadow_of(keys, values, name)
        found[name] = rotate([paged(request, shadow) for request in everyone])
    return found


def bench(args: argparse.Namespace, context: int, queries: int, heads: tuple[int, int, int]) -> dict[str, object]:
    medians = interleaved(candidates(context, queries, heads, args.footprint << 20), args, args.calls)
    pool_bytes = 4 * context * heads[1] * heads[2]
    cells = "  ".join(f"{name} {seconds * 1e6:8.0f}" for name, seconds in medians.items())
    rate = pool_bytes / medians["bf16"] / 1e9
    label = "x".join(map(str, heads))
    print(f"{label:>9} context {context:5d} queries {queries:4d} us: {cells}  bf16 {rate:.1f} GB/s", flush=True)
    return {"context": context, "queries": queries, "heads": heads, "pool_bytes": pool_bytes, "seconds": medians}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=numbers, default=[512, 2048, 8192])
    parser.add_argument("--queries", type=numbers, default=[1, 5], help="query tokens of the one request")
    parser.add_argument(
        "--heads", action="append", help="query heads x KV heads x head_dim, repeatable; default 16x8x128 and 14x2x64"
    )
    parser.add_argument("--isa", help="instruction set, default: the preferred one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--statistic", choices=["median", "fastest"], default="median")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--calls", type=int, default=3, help="calls a turn")
    parser.add_argument("--footprint", type=int, default=1200, help="MiB of pool that the requests rotate over")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts one thread: add --threads 1")
    torch.set_num_threads(args.threads)
    kernels.set_isa(args.isa or "auto")
    report: dict[str, object] = {"machine": {**machine(), "clock": args.clock, "statistic": args.statistic}}
    print(report["machine"])
    results = []
    with torch.inference_mode():
        for text in args.heads or ["16x8x128", "14x2x64"]:
            q_heads, kv_heads, dim = numbers(text.lower().replace("x", ","))
            for context in args.contexts:
                results += [bench(args, context, queries, (q_heads, kv_heads, dim)) for queries in args.queries]
    print("load average after:", os.getloadavg())
    report["attention"] = results
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
