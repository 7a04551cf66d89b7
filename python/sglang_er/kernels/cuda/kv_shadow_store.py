from __future__ import annotations

import torch

from sglang_er.kernels.cuda import loader
from sglang_er.kernels.kv_shadow import KvShadow

DIMS = frozenset({64, 96, 128, 256})


def serves(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, shadow: KvShadow) -> bool:
    """Whether there is a library for this GPU, and the dimensions are among the compiled ones."""
    del slots, shadow
    return loader.serves("kv_shadow_store", keys.device) and {keys.shape[2], values.shape[2]} <= DIMS


def kv_shadow_store(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, shadow: KvShadow) -> None:
    """The bits of the reference. A slot outside the pool is left out: the list is not looked at on the host."""
    loader.module("kv_shadow_store", keys.device).kv_shadow_store(
        keys,
        values,
        slots,
        shadow.format,
        shadow.keys,
        shadow.values,
        shadow.key_scales,
        shadow.value_scales,
    )
