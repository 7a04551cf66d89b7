"""Section `baselines`: the speculation that SGLang has without this project, against its plain decode: n-grams, and a
quantized copy of the same model as the drafter (a KV pool and a prefill of its own). Same requests, a server for each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sglang_er.cli.common import card_of
from sglang_er.rollout import prompts
from sglang_er.rollout.measure import jobs_of, send_all

from .rollouts import client_of
from .sections import Cell, Context, Options, Section, Skip

KINDS = ("7b plain", "7b plain fa3", "7b plain flashinfer", "7b ngram", "7b standalone humming", "7b standalone fp8")
BATCHES, PROMPT, OUTPUT, REPEATS = (1, 16), 1024, 128, 3


def cells(options: Options) -> Sequence[Cell]:
    return [Cell(kind, partial(measure, kind)) for kind in KINDS]


def measure(kind: str, context: Context) -> dict[str, Any]:
    if context.options.url is not None or context.options.dry_run:
        raise Skip("needs servers of its own, on a GPU")
    client = client_of(context, kind)
    text = prompts.knows_the_task(card_of(Path(client.model_path())))
    rates, quotients = {}, {}
    plain = context.find("baselines", KINDS[0])
    for batch in BATCHES:
        requests = prompts.make_requests([OUTPUT] * batch, PROMPT, text, seed=0)
        # Prompts into the prefix cache; kernels that are compiled at first use.
        send_all(jobs_of(client, requests, 1.0, tokens=8), at_once=batch)
        found = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            tokens = sum(reply.tokens for reply in send_all(jobs_of(client, requests, 1.0), at_once=batch))
            found.append(tokens / (time.perf_counter() - began))
        rates[f"B={batch}"] = statistics.median(found)
        if kind != KINDS[0] and plain and "tokens_per_second" in plain["values"]:
            quotients[f"B={batch}"] = rates[f"B={batch}"] / plain["values"]["tokens_per_second"][f"B={batch}"]
    shown = ", ".join(
        f"{name} {rate:.0f} tokens/s" + (f" ({quotients[name]:.2f}x)" if name in quotients else "")
        for name, rate in rates.items()
    )
    return {"shown": shown, "tokens_per_second": rates, "over_plain": quotients, "prompt": PROMPT, "output": OUTPUT}


SECTION = Section("baselines", cells)
