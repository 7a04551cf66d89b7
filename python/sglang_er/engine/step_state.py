"""What the policy may know of the step that comes: host data, the same on every rank, without a device sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_er.engine import rows
from sglang_er.policy import TRACKED_ROWS, StepState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def step_state(batch: ScheduleBatch, speculating: list[int] | None, gamma_max: int, context_len: int) -> StepState:
    """gamma_limit: at most `gamma_max`, the context's end, and the tokens that the requests may still emit."""
    reqs = batch.reqs if speculating is None else [batch.reqs[i] for i in speculating]
    longest, total = _context_lengths(batch, 2 * (gamma_max + 1))
    # Verify reads positions up to longest + gamma: all of them must exist.
    limit = min(gamma_max, context_len - 1 - longest, rows.tokens_left(reqs) - 1)
    return StepState(
        batch_size=len(batch.reqs),
        context_tokens=total,
        gamma_limit=max(0, limit),
        speculative_rows=len(reqs),
        requests=tuple(req.rid for req in reqs) if len(reqs) <= TRACKED_ROWS else (),
    )


def _context_lengths(batch: ScheduleBatch, lag: int) -> tuple[int, int]:
    """(longest, total) committed tokens: exact where lengths live on the host, else an upper bound (under overlap the
    host's view is at most two steps old, `lag` tokens)."""
    lens = batch.seq_lens_cpu
    if lens is not None:
        return int(lens.max()), int(lens.sum())
    host = [len(r.origin_input_ids) + len(r.output_ids) + lag for r in batch.reqs]
    return max(host), sum(host)
