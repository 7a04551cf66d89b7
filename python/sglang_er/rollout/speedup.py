"""What speculation could gain at a batch size and context: the best draft length for known costs and acceptance.

  speed-up = max over g of E(g) * T_ar / T_cycle(g),  E(g) = 1 + alpha + ... + alpha^g

g = 0 is among the choices, so that the speed-up is at least 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sglang_er.rollout.costs import StepTable
from sglang_er.rollout.oracle import expected_tokens

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)


class Best(NamedTuple):
    batch: int
    context: int
    gamma: int
    speed_up: float
    plain: float  # seconds
    draft: float
    verify: float  # at `gamma`, plain decode at 0


def best(table: StepTable, batch: int, context: int, alpha: float) -> Best:
    cycle = table.at(batch, context)
    plain = cycle.seconds[0]
    gains = [expected_tokens(gamma, [alpha]) * plain / seconds for gamma, seconds in enumerate(cycle.seconds)]
    gamma = max(range(len(gains)), key=gains.__getitem__)
    return Best(batch, context, gamma, gains[gamma], plain, cycle.draft, cycle.seconds[gamma] - gamma * cycle.draft)


def break_even(table: StepTable, context: int, alpha: float, batch_max: int) -> int:
    """The largest batch at which drafting gains anything; 0 where it never does."""
    for batch in range(batch_max, 0, -1):
        if best(table, batch, context, alpha).gamma:
            return batch
    return 0


def to_json(table: StepTable, context: int, alpha: float, batch_max: int) -> dict[str, object]:
    rows = [best(table, batch, context, alpha) for batch in BATCHES if batch <= batch_max]
    return {
        "context": context,
        "alpha": alpha,
        "break_even_batch": break_even(table, context, alpha, batch_max),
        "batches": [
            {
                "batch": row.batch,
                "best_gamma": row.gamma,
                "speed_up": round(row.speed_up, 4),
                "plain_ms": round(1e3 * row.plain, 4),
                "draft_ms": round(1e3 * row.draft, 4),
                "verify_ms": round(1e3 * row.verify, 4),
            }
            for row in rows
        ],
    }


def draw(
    path: Path, table: StepTable, alpha: float, title: str, batches: Sequence[int], contexts: Sequence[int]
) -> None:
    """A map over (batch, context): colour and number are the speed-up, the number below the draft length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [[best(table, batch, context, alpha) for batch in batches] for context in contexts]
    size = 2.5 + 0.55 * len(batches), 1.6 + 0.5 * len(contexts)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    values = [[cell.speed_up for cell in row] for row in cells]
    top = max(1.01, *(max(row) for row in values))
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="Blues", vmin=1.0, vmax=top)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            dark = cell.speed_up > 1 + 0.6 * (top - 1)
            text = f"{cell.speed_up:.2f}\n{cell.gamma}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "#222222")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_yticks(range(len(contexts)), [str(context) for context in contexts])
    axes.set_xlabel("requests in the batch")
    axes.set_ylabel("context, tokens")
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, label="speed-up over plain decode")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
