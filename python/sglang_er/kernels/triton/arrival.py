"""One launch in place of two: the program of a row that comes last goes on with what the others have left in memory.

A counter a row, 0 between launches: the last program sets it back. Sums are left by every program in its own place and
added by the last one in their order, so that nothing depends on who it is.
"""
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LEAST_ROWS = 128
_zeros: dict[tuple[torch.device, int], torch.Tensor] = {}


@triton.jit
def arrives_last(counters, row, programs):
    """Whether the row's other `programs` have been here. What they stored before may be read after."""
    tl.debug_barrier()  # all of this program's threads have stored
    last = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.store(counters + row, 0, mask=last)
    return last


def counters(rows: int, device: torch.device) -> torch.Tensor:
    """int32 zeros for at least `rows` rows. Kept for every stream, whose launches follow each other; a graph that is
    being recorded gets its own, which it sets itself."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(rows, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    kept = _zeros.get(key)
    if kept is None or len(kept) < rows:
        size = max(_LEAST_ROWS, triton.next_power_of_2(rows))
        kept = _zeros[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return kept
