"""The KV shadow over SGLang's pool, and who clears the flags of slots that SGLang writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_er.kernels.kv_shadow import ShadowFormat
from sglang_er.twin.kv_shadow import ShadowPool

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

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


def shadow_pool(runner: ModelRunner, valid: torch.Tensor, format: ShadowFormat) -> ShadowPool:
    """A shadow of the runner's pool with these flags. Raises ValueError where something writes the pool unseen, or
    where sizes do not fit the format."""
    if runner.server_args.enable_hierarchical_cache:
        raise ValueError("--enable-hierarchical-cache writes the KV pool past the shadow: add --er-kv-shadow off")
    pool = runner.token_to_kv_pool
    return ShadowPool(pool.k_buffer, pool.v_buffer, valid, format)


def _clearing(write: Any, position: int, valid: torch.Tensor) -> Any:
    def clear_and_write(*args: Any, **kwargs: Any) -> Any:
        slots = args[position] if len(args) > position else None
        if isinstance(slots, KVWriteLoc):
            slots = slots.loc
        if isinstance(slots, torch.Tensor):
            valid.index_fill_(0, slots.to(torch.int64).flatten(), 0)
        else:
            valid.zero_()  # called in a way that we do not know: nothing of the shadow may be trusted
        return write(*args, **kwargs)

    return clear_and_write
