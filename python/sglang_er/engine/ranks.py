"""The ranks of a tensor-parallel engine: they run the same passes over the same tokens, because one of them says which.

Every rank measures time by its own clock, so every rank would choose a little differently, and ranks that run passes of
different widths wait for each other for ever. Choices go over the CPU's process group, an integer or a time each: no
device sync. Tokens go over the device's: drafts before they are verified, and what a step committed. Should a logit
differ in its last bit from rank to rank, a sample may, too; the first rank's tokens are right for the distributions
that it has, whatever the others would have drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed import ReduceOp, all_reduce, broadcast, broadcast_object_list, get_process_group_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """`host`, `device`: the process groups, None for an engine of one rank."""

    def __init__(self, host: ProcessGroup | None = None, device: ProcessGroup | None = None) -> None:
        self._host = None if host is None or host.size() == 1 else host
        self._device = None if device is None or device.size() == 1 else device
        self.alone = self._host is None
        self.count = 1 if self._host is None else self._host.size()
        self.first = self._host is None or self._host.rank() == 0

    def agreed(self, gamma: int) -> int:
        """The first rank's draft length, or 0 if any rank offers 0 (False)."""
        if self._host is None:
            return gamma
        offer = gamma if self.first or gamma == 0 else torch.iinfo(torch.int32).max
        decision = torch.tensor([offer], dtype=torch.int32)
        all_reduce(decision, op=ReduceOp.MIN, group=self._host)
        return int(decision)

    def seconds(self, measured: float) -> float:
        """The first rank's."""
        if self._host is None:
            return measured
        told = torch.tensor([measured], dtype=torch.float64)
        broadcast(told, src=get_process_group_ranks(self._host)[0], group=self._host)
        return float(told)

    def told(self, text: str) -> str:
        """The first rank's; for start-up."""
        if self._host is None:
            return text
        heard = [text]
        broadcast_object_list(heard, src=get_process_group_ranks(self._host)[0], group=self._host)
        return heard[0]

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, in place of this one; contiguous, of equal shape and dtype everywhere."""
        if self._device is not None:
            broadcast(tokens, src=get_process_group_ranks(self._device)[0], group=self._device)
        return tokens


ALONE = Ranks()
