"""One rank of an engine that decides draft lengths, in a process of its own."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.distributed as distributed

from sglang_er.config import ConfigError, RolloutConfig
from sglang_er.engine import kernel_table
from sglang_er.engine.controller import Controller
from sglang_er.engine.ranks import ALONE, Ranks
from sglang_er.kernels import registry
from sglang_er.policy import StepOutcome, StepState

RANKS = 2
STEPS = 300


def decide(rank: int, folder: str, together: bool) -> None:
    """One rank: the same accepted tokens as the other, another idea of time."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    ranks = Ranks(distributed.group.WORLD) if together else ALONE
    controller = Controller(RolloutConfig(policy="goodput"), {}, ranks)
    luck, clock = random.Random(0), random.Random(rank)
    chosen = []
    for step in range(STEPS):
        rows = max(1, 16 - step // 20)
        state = StepState(rows, rows * 300, 7, rows)
        gamma = controller.choose(state)
        chosen.append(gamma)
        lens = [1 + sum(luck.random() < 0.8 for _ in range(gamma)) for _ in range(rows)]
        draft = gamma * (0.002 + 0.004 * rank) * clock.gauss(1, 0.1)
        seconds = draft + 0.01 * max(1.0, rows * (gamma + 1) / 32) * clock.gauss(1, 0.1)
        controller.observe(StepOutcome(state, gamma, lens, seconds, draft if gamma else float("nan")))
    Path(folder, f"chosen{rank}").write_text(",".join(map(str, chosen)))
    distributed.destroy_process_group()


def exchange(rank: int, folder: str) -> None:
    """What one rank hears; the first one offers 3 (then 0), .25 s and [1, 2], the second 5 (0), .5 s and [3, 4]."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    ranks = Ranks(distributed.group.WORLD, distributed.group.WORLD)
    heard = [
        ranks.agreed(3 if rank == 0 else 5),
        ranks.agreed(3 if rank == 0 else 0),
        ranks.agreed(0 if rank == 0 else 5),
        ranks.seconds(0.25 * (rank + 1)),
        ranks.told(f"text of {rank}"),
        ranks.share(torch.tensor([1, 2]) + 2 * rank).tolist(),
        (ranks.first, ranks.alone),
    ]
    Path(folder, f"heard{rank}").write_text(repr(heard))
    distributed.destroy_process_group()


def install_table(rank: int, folder: str, device: str) -> None:
    """One rank installs its own file `table<rank>.json`; writes down the table that it has then, or the mistake."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        kernel_table.install(str(Path(folder, f"table{rank}.json")), device, Ranks(distributed.group.WORLD))
        got = repr(registry.table_in_use())
    except ConfigError as error:
        got = str(error)
    Path(folder, f"table{rank}.got").write_text(got)
    distributed.destroy_process_group()
