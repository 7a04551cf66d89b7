"""Clears the shadow's flags of slots that SGLang writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

# Methods of SGLang's MHA pool that write slots -> the position of the argument that says which.
FORWARDS = {"set_kv_buffer": 1}
OTHERS = {"move_kv_cache": 0, "load_cpu_copy": 1}


def watch_pool(pool: Any, writers: Mapping[str, int]) -> torch.Tensor:
    """Flags uint8 [slots], cleared for whatever these methods of the pool write."""
    keys = pool.k_buffer[0]
    valid = torch.zeros(keys.shape[0], dtype=torch.uint8, device=keys.device)
    for name, position in writers.items():
        setattr(pool, name, _clearing(getattr(pool, name), position, valid))
    return valid


def _clearing(write: Any, position: int, valid: torch.Tensor) -> Any:
    def clear_and_write(*args: Any, **kwargs: Any) -> Any:
        slots = args[position] if len(args) > position else None
        if isinstance(slots, KVWriteLoc):
            slots = slots.loc
        if isinstance(slots, torch.Tensor):
            valid[slots.to(torch.int64)] = 0
        else:
            valid.zero_()  # called in a way that we do not know: nothing of the shadow may be trusted
        return write(*args, **kwargs)

    return clear_and_write
