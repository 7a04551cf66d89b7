"""The quantized copy of one layer's KV pool that a draft may read instead of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

INT4_DIM_MULTIPLE = 32
BITS = (4, 8)


@dataclass(frozen=True, eq=False, slots=True)
class KvShadow:
    """Keys and values by slot, in the layout of ``csrc/include/sglang_er/kv_shadow.h``.

    Which slots may be read (``valid``, uint8 ``[slots]``) is the same for all layers and passed separately.
    """

    keys: torch.Tensor
    """int8 ``[slots, kv_heads, head_dim]``, or uint8 ``[slots, kv_heads, head_dim / 2]`` of two 4-bit levels."""
    values: torch.Tensor
    """The same for ``value_dim``."""
    key_scales: torch.Tensor
    """bfloat16 ``[slots, kv_heads]``."""
    value_scales: torch.Tensor
    """bfloat16 ``[slots, kv_heads]``."""
    bits: int

    @classmethod
    def empty(
        cls,
        slots: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        bits: int,
        device: torch.device | str = "cpu",
    ) -> KvShadow:
        """Buffers for a pool of that size, not yet written."""
        if bits not in BITS:
            raise ValueError(f"a KV shadow has 4 or 8 bits, not {bits}")
        if bits == 4 and (head_dim % INT4_DIM_MULTIPLE or value_dim % INT4_DIM_MULTIPLE):
            raise ValueError(
                f"an int4 KV shadow needs head_dim and value_dim that are multiples of {INT4_DIM_MULTIPLE}, "
                f"not {head_dim} and {value_dim}; int8 takes any"
            )
        dtype = torch.int8 if bits == 8 else torch.uint8

        def levels(dim: int) -> torch.Tensor:
            return torch.empty((slots, kv_heads, dim * bits // 8), dtype=dtype, device=device)

        def scales() -> torch.Tensor:
            return torch.empty((slots, kv_heads), dtype=torch.bfloat16, device=device)

        return cls(levels(head_dim), levels(value_dim), scales(), scales(), bits)

    @property
    def nbytes(self) -> int:
        return int(sum(t.nbytes for t in (self.keys, self.values, self.key_scales, self.value_scales)))

    def check_fits(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Made for a pool of these keys and values."""
        made = [[*t.shape[:2], t.shape[2] * 8 // self.bits] for t in (self.keys, self.values)]
        if made != [list(keys.shape), list(values.shape)]:
            raise ValueError(f"shadow was made for {made}, the pool has {[list(keys.shape), list(values.shape)]}")
