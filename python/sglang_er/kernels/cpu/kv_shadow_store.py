from __future__ import annotations

import torch

from sglang_er.kernels.cpu.loader import library
from sglang_er.kernels.kv_shadow import KvShadow


def serves(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, shadow: KvShadow) -> bool:
    """int8 and int4: fp8 is for GPUs."""
    del keys, values, slots
    return shadow.format != "fp8"


def kv_shadow_store(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, shadow: KvShadow) -> None:
    threads = torch.get_num_threads()
    library().kv_shadow_store(
        keys,
        values,
        slots,
        shadow.bits,
        shadow.keys,
        shadow.values,
        shadow.key_scales,
        shadow.value_scales,
        threads,
    )
