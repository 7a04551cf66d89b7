"""One draft length for all ranks of a tensor-parallel engine.

Every rank measures time by its own clock, so every rank would decide a little differently, and ranks that run passes of
different widths wait for each other for ever. The first rank decides; the others take its word. One integer per step,
over the CPU's process group: no device sync.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup, broadcast, get_process_group_ranks


def agreed(gamma: int, group: ProcessGroup | None) -> int:
    """The first rank's draft length; `gamma` itself where there is one rank."""
    if group is None or group.size() == 1:
        return gamma
    decision = torch.tensor([gamma], dtype=torch.int32)
    broadcast(decision, src=get_process_group_ranks(group)[0], group=group)
    return int(decision)
