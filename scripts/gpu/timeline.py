"""Section `timeline`: some steps of a running batch under torch's profiler (the server's /start_profile): for which
share of the time the GPU has nothing to do, and between which kernels. On a CPU: the same of torch's ops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from sglang_er.cli.common import card_of
from sglang_er.rollout import bench, prompts
from sglang_er.rollout.client import Client
from sglang_er.rollout.measure import jobs_of, send_all
from sglang_er.rollout.steps import Steps

from . import trace
from .rollouts import client_of
from .sections import Cell, Context, Options, Section, Skip

FORWARDS, PROMPT, OUTPUT = 12, 1024, 1500
DRY_FORWARDS, DRY_PROMPT, DRY_OUTPUT = 4, 32, 300
# Steps that the batch has to be in before the profiler starts.
LEAST_STEPS, WAIT_SECONDS = 8, 120.0


def cells(options: Options) -> Sequence[Cell]:
    batches, gammas = ((2,), (3,)) if options.dry_run else ((1, 16), (0, 3))
    return [Cell(f"7b B={b} gamma={g}", partial(measure, b, g)) for b in batches for g in gammas]


def measure(batch: int, gamma: int, context: Context) -> dict[str, Any]:
    options = context.options
    if options.url is not None:
        raise Skip("its trace would slow down what others do with that server")
    client = client_of(context, "7b")
    prompt, output = (DRY_PROMPT, DRY_OUTPUT) if options.dry_run else (PROMPT, OUTPUT)
    text = prompts.knows_the_task(card_of(Path(client.model_path())))
    requests = prompts.make_requests([output] * batch, prompt, text, seed=0)
    folder = options.out / "traces" / f"B{batch}-gamma{gamma}"
    usual = bench.switchable(client.state())
    client.set_policy({**usual, "policy": "fixed", "gamma": gamma})
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(send_all, jobs_of(client, requests, 1.0), None, batch)
            _wait_for_steps(client)
            file = _profile(client, folder, options)
            running.result()
    finally:
        client.set_policy(usual)
    categories = trace.CPU_CATEGORIES if options.dry_run else trace.GPU_CATEGORIES
    found = trace.gaps(trace.load(file), categories)
    file.unlink()
    shown = f"idle {100 * found['idle_share']:.1f} % of {found['span_us'] / 1e3:.1f} ms, {found['launches']} launches"
    return {"shown": shown, "forwards": DRY_FORWARDS if options.dry_run else FORWARDS, **found}


def _wait_for_steps(client: Client) -> None:
    first = sum(Steps.total(client.state()).steps_by_gamma.values())
    _wait_until(lambda: sum(Steps.total(client.state()).steps_by_gamma.values()) >= first + LEAST_STEPS, "decode steps")


def _profile(client: Client, folder: Path, options: Options) -> Path:
    """The trace of the next forwards. Raises RuntimeError where the server refuses, TimeoutError without a trace."""
    known = set(folder.glob("*.json.gz"))
    body = {
        "output_dir": str(folder.resolve()),
        "num_steps": DRY_FORWARDS if options.dry_run else FORWARDS,
        "activities": ["CPU"] if options.dry_run else ["CPU", "GPU"],
        "with_stack": False,
        "record_shapes": False,
    }
    reply = client.send("POST", "/start_profile", body)
    if reply.status_code != 200:
        raise RuntimeError(f"/start_profile: {reply.status_code} {reply.text[:300]}")

    def complete() -> bool:
        try:
            return any(trace.load(file) for file in set(folder.glob("*.json.gz")) - known)
        except (ValueError, EOFError, OSError):
            return False

    _wait_until(complete, "a trace")
    return next(iter(set(folder.glob("*.json.gz")) - known))


def _wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {WAIT_SECONDS:.0f} s")
        time.sleep(0.1)


SECTION = Section("timeline", cells)
