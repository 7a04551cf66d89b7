from __future__ import annotations

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cpu.loader import library


def quantize_pack(weight: torch.Tensor, clip_search: bool, out: PackedWeight) -> None:
    threads = torch.get_num_threads()
    library().quantize_pack(weight.detach(), out.packed, out.scales_zeros, out.group_size, clip_search, threads)
