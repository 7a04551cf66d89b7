"""The quantized copy of one layer's KV pool that a draft may read instead of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch

ShadowFormat = Literal["int8", "int4", "fp8"]
FORMATS: tuple[ShadowFormat, ...] = get_args(ShadowFormat)


@dataclass(frozen=True, slots=True)
class Levels:
    """How the levels of a format lie in memory."""

    dtype: torch.dtype
    bits: int
    dim_multiple: int = 1
    """Of head_dim and value_dim."""

    def bytes_of(self, dim: int) -> int:
        return dim * self.bits // 8


LEVELS: Mapping[ShadowFormat, Levels] = MappingProxyType(
    {
        "int8": Levels(torch.int8, 8),
        "int4": Levels(torch.uint8, 4, dim_multiple=32),
        # Codes of float8_e4m3fn. As bytes: compilers for GPUs before Hopper do not know the type.
        "fp8": Levels(torch.uint8, 8),
    }
)


@dataclass(frozen=True, eq=False, slots=True)
class KvShadow:
    """Keys and values by slot, in the layout of ``csrc/include/sglang_er/kv_shadow.h``.

    Which slots may be read (``valid``, uint8 ``[slots]``) is the same for all layers and passed separately.
    """

    keys: torch.Tensor
    """``[slots, kv_heads, head_dim]``, int8 or (fp8) uint8; int4: uint8 ``[slots, kv_heads, head_dim / 2]`` of two
    levels each."""
    values: torch.Tensor
    """The same for ``value_dim``."""
    key_scales: torch.Tensor
    """bfloat16 ``[slots, kv_heads]``."""
    value_scales: torch.Tensor
    """bfloat16 ``[slots, kv_heads]``."""
    format: ShadowFormat

    @classmethod
    def empty(
        cls,
        slots: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        format: ShadowFormat,
        device: torch.device | str = "cpu",
    ) -> KvShadow:
        """Buffers for a pool of that size, not yet written. Raises ValueError where the sizes do not fit the format."""
        kind = LEVELS.get(format)
        if kind is None:
            raise ValueError(f"a KV shadow is one of {', '.join(FORMATS)}, not {format!r}")
        if head_dim % kind.dim_multiple or value_dim % kind.dim_multiple:
            raise ValueError(
                f"an {format} KV shadow needs head_dim and value_dim that are multiples of {kind.dim_multiple}, "
                f"not {head_dim} and {value_dim}; int8 and fp8 take any"
            )

        def levels(dim: int) -> torch.Tensor:
            return torch.empty((slots, kv_heads, kind.bytes_of(dim)), dtype=kind.dtype, device=device)

        def scales() -> torch.Tensor:
            return torch.empty((slots, kv_heads), dtype=torch.bfloat16, device=device)

        return cls(levels(head_dim), levels(value_dim), scales(), scales(), format)

    @property
    def bits(self) -> int:
        """Of a level."""
        return LEVELS[self.format].bits

    @property
    def nbytes(self) -> int:
        return int(sum(t.nbytes for t in (self.keys, self.values, self.key_scales, self.value_scales)))

    def check_fits(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Made for a pool of these keys and values."""
        made = [[*t.shape[:2], t.shape[2] * 8 // self.bits] for t in (self.keys, self.values)]
        if made != [list(keys.shape), list(values.shape)]:
            raise ValueError(f"shadow was made for {made}, the pool has {[list(keys.shape), list(values.shape)]}")
