"""The KV shadow of a draft pass that is one function of buffers: quantized right behind every forward that writes KV.

Nobody may look at flags on the host there, so nothing is left to be quantized later. Provisional KV of a draft is not
quantized: attention reads the newest tokens exactly, and the verify pass writes those slots again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from sglang_er.engine.draft_loop import BUCKETS
from sglang_er.engine.graphs import EagerGraphs, choice
from sglang_er.kernels.base import WEIGHT_DTYPES
from sglang_er.kernels.kv_shadow import LEVELS
from sglang_er.twin.kv_shadow import shadow_format

if TYPE_CHECKING:
    from sglang_er.config import RolloutConfig
    from sglang_er.twin.kv_shadow import ShadowPool

# Slots of a decode or verify pass, which go through a graph; those of a prefill are stored directly.
MOST_RECORDED = 512


class WrittenShadow:
    """`pool`: whose flags are cleared by whatever else writes the KV pool."""

    def __init__(self, pool: ShadowPool, graphs: EagerGraphs) -> None:
        self.pool = pool
        self._graphs = graphs
        self._slots = torch.zeros(MOST_RECORDED, dtype=torch.int64, device=self.pool.valid.device)

    def written(self, slots: torch.Tensor) -> None:
        """A forward has written these slots, int [n]."""
        count = slots.numel()
        if count > MOST_RECORDED:
            self.pool.store(slots.to(torch.int64))
        elif count:
            bucket = 1 << (count - 1).bit_length()
            self._slots[:count].copy_(slots)
            self._slots[count:bucket].fill_(0)  # the slot that SGLang keeps for padding
            self._graphs.run(("shadow", bucket), partial(self.pool.store, self._slots[:bucket]))
        self.pool.stored_slots += count


def longest_context(context_len: int, requests: int | None, slots: int | None) -> int:
    """Tokens of context of the largest whole pass: of so many requests at most, in so many KV slots (None: unknown)."""
    rows = BUCKETS[-1] if requests is None else min(requests, BUCKETS[-1])
    return rows * context_len if slots is None else min(rows * context_len, slots)


def with_shadow(
    cell_bytes: int, config: RolloutConfig, device: str, head_dim: int, dtype: torch.dtype, longest: int
) -> int:
    """What a token takes in the KV pool (`cell_bytes`, all layers) and in the shadow if that is made at start-up;
    `longest` as longest_context has it."""
    format = shadow_format(config, device)
    if device == "cpu" or format is None or choice(config, device) == "off" or dtype not in WEIGHT_DTYPES:
        return cell_bytes
    if longest < config.kv_shadow_from:
        return cell_bytes
    # Levels, and a scale of 2 bytes for each head's keys and values; the flag is a byte a slot.
    share = (LEVELS[format].bits / 8 + 2 / head_dim) / dtype.itemsize
    return int(cell_bytes * (1.0 + share)) + 1
