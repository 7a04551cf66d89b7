#!/usr/bin/env python3
"""Measure what docs/models.md reports, and the committed kappa table.

python scripts/measure_models.py tiny                    # both small models on the three prompt sets, and their alpha
python scripts/measure_models.py kappa --arch qwen3 --shape 0.5b   # search kappa for alpha .95, store it
python scripts/measure_models.py prompts                 # write the prompt sets again
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from sglang_er.models import alpha, evaluate, make, sizes, streams, task
from sglang_er.models.expand import Expansion

ASSETS = Path(make.__file__).parent / "assets"


def measure_tiny(arch: str, limit: int) -> None:
    """Print accuracy, entropy and lengths of a small model on each prompt set and on all together, and its alpha."""
    with tempfile.TemporaryDirectory() as folder:
        make.make_model("tiny", arch, Path(folder) / "m", dtype="float32", progress=lambda line: None)
        model = evaluate.load_model(Path(folder) / "m")
    everything = []
    for difficulty in task.DIFFICULTIES:
        samples = evaluate.sample(model, task.load_prompts(difficulty)[:limit], seed=1)
        everything += samples
        show(arch, difficulty, evaluate.summarize(samples))
    show(arch, "all", evaluate.summarize(everything))
    batch = streams.text_batch(rows=32)
    print(f"{arch}: alpha with the target's KV {alpha.measure_tiny(arch, *batch):.4f}, "
          f"with its own {alpha.measure_tiny(arch, *batch, shared_kv=False):.4f}")  # fmt: skip


def show(arch: str, name: str, numbers: dict[str, float]) -> None:
    print(f"{arch} {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in numbers.items()), flush=True)


def measure_kappa(arch: str, shape: str, target: float, store: bool) -> None:
    """Search kappa for `target`, print every try, and put the result into the committed table."""
    started = time.monotonic()
    batch = streams.text_batch()
    size = sizes.public_size(arch, shape)
    kappa, reached = alpha.find_kappa(
        lambda kappa: alpha.measure(Expansion(arch, size.shape, kappa), *batch),
        target,
        lambda line: print(line, flush=True),
    )
    print(f"{arch} {shape}: kappa {kappa:.4f} gives alpha {reached:.4f} ({time.monotonic() - started:.0f} s)")
    if store:
        path = ASSETS / "kappa.json"
        rows = [row for row in json.loads(path.read_text()) if (row["arch"], row["shape"]) != (arch, shape)]
        rows.append(
            {
                "arch": arch,
                "shape": shape,
                "target_alpha": target,
                "seed": 0,
                "kappa": kappa,
                "alpha": round(reached, 4),
            }
        )
        rows.sort(key=lambda row: (row["arch"], row["shape"]))
        path.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tiny", "kappa", "prompts"))
    parser.add_argument("--arch", default=None)
    parser.add_argument("--shape", choices=sizes.BIG_SHAPES, default="0.5b")
    parser.add_argument("--target-alpha", type=float, default=make.DEFAULT_ALPHA)
    parser.add_argument("--limit", type=int, default=task.PROMPTS_PER_SET, help="prompts per set")
    parser.add_argument("--no-store", action="store_true", help="print the kappa, leave the table as it is")
    args = parser.parse_args()
    with torch.inference_mode():
        if args.what == "tiny":
            for arch in [args.arch] if args.arch else ["qwen3", "llama"]:
                measure_tiny(arch, args.limit)
        elif args.what == "kappa":
            measure_kappa(args.arch or "qwen3", args.shape, args.target_alpha, not args.no_store)
        else:
            for difficulty in task.DIFFICULTIES:
                text = task.to_jsonl(task.generate_prompts(difficulty))
                (ASSETS / f"prompts_{difficulty}.jsonl").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
