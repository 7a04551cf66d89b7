"""Section `ingredients`: what each ingredient of the twin costs in acceptance, on a model that is trained here first: a
made one's acceptance was chosen. `train_tiny.py` trains it, once; `bench_ingredients.py` measures, all at once at the
first cell that asks.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import bench_ingredients

from sglang_er.cli.common import cache_dir, models_hash

from .sections import Cell, Context, Options, Section, Skip, shortened
from .servers import GPU_FLAGS, OURS, TRITON

SCRIPTS = Path(__file__).parent.parent
# 6.5 million weights, 13 MB.
TRAINING = (
    *("--device", "cuda", "--bf16", "--hidden", "384", "--layers", "8"),
    *("--batch-tokens", "32768", "--lr", "1e-3", "--minutes", "4", "--log-every", "200"),
)
DRY_TRAINING = ("--hidden", "64", "--layers", "2", "--batch-tokens", "1024", "--minutes", "0.05")
# Whole passes, which read a KV shadow, without recording them: it is not speed that is measured here.
SERVER_FLAGS = (
    *(*GPU_FLAGS, "--attention-backend", TRITON, *OURS, "eager"),
    *("--disable-cuda-graph", "--mem-fraction-static", "0.5"),
)
TRAIN_SECONDS, MEASURE_SECONDS = 900, 1500


def cells(options: Options) -> Sequence[Cell]:
    """The weights alone, the KV shadows beside them, and the same with a quantized lm_head."""
    ingredients = product(bench_ingredients.HEADS, bench_ingredients.shadows(options.device))
    return [Cell("train", train), *[Cell(_name(*which), partial(measure, *which)) for which in ingredients]]


def _name(head: bool, shadow: str) -> str:
    return "weights" + (" + lm_head" if head else "") + ("" if shadow == "off" else f" + {shadow} KV")


def train(context: Context) -> dict[str, Any]:
    folder = trained(context.options)
    if (folder / "config.json").is_file():
        return {"shown": f"it is there: {folder.name}", "trained": False}
    if context.servers is not None:
        context.servers.stop()  # it has the memory
    training = DRY_TRAINING if context.options.dry_run else TRAINING
    printed = _run("train_tiny.py", "--arch", "qwen3", *training, "--checkpoint", str(folder), seconds=TRAIN_SECONDS)
    steps = [line for line in printed.splitlines() if line.startswith("step")]
    megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    return {"shown": " ".join(steps[-1].split()), "trained": True, "megabytes": megabytes, "steps": steps}


def measure(head: bool, shadow: str, context: Context) -> dict[str, Any]:
    if context.options.url is not None:
        raise Skip("needs servers of its own")
    if not (trained(context.options) / "config.json").is_file():
        raise Skip("no model was trained")
    if context.servers is not None:
        context.servers.stop()
    rows, error = _measured(context.options)
    if error is not None:
        raise RuntimeError(error)
    lm_head = "int4" if head else "exact"
    (row,) = [row for row in rows if (row["lm_head"], row["activations"], row["kv"]) == (lm_head, "exact", shadow)]
    shown = f"alpha {row['alpha']:.4f} ± {2 * row['error']:.4f}, accept length {row['accept_length']:.3f}"
    return {"shown": shown, "gamma": bench_ingredients.GAMMA, **row}


def trained(options: Options) -> Path:
    """The folder of the model, which may not be there yet."""
    return cache_dir() / "gpu-check" / f"qwen3-trained-{'dry-' if options.dry_run else ''}{models_hash()}"


@cache
def _measured(options: Options) -> tuple[list[dict[str, Any]], str | None]:
    """Rows of all cells, or why there are none: it is not tried again for the next cell."""
    file = options.out / "ingredients.json"
    flags = () if options.dry_run else SERVER_FLAGS
    size = ("--requests", "4", "--output", "16") if options.dry_run else ()
    command = ("--model-path", str(trained(options)), "--activations", "exact", "--json", str(file), *size)
    try:
        _run("bench_ingredients.py", *command, f"--flags={shlex.join(flags)}", seconds=MEASURE_SECONDS)
        return json.loads(file.read_text(encoding="utf-8"))["rows"], None
    except RuntimeError as error:
        return [], str(error)


def _run(script: str, *arguments: str, seconds: float) -> str:
    """What it printed. Raises RuntimeError with its last lines where it fails, or does not end."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    # A dry run interprets kernels in this process; a server must not.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{script} did not end within {seconds:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{script}: {shortened(done.stderr or done.stdout)}")
    return done.stdout


SECTION = Section("ingredients", cells)
