"""A weight in the layout of SGLang's Marlin kernel, beside our own ``PackedWeight``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_er.kernels.base import HALF_DTYPES, WEIGHT_DTYPES, PackedWeight

TILE_ROWS, TILE_COLS = 64, 16
"""Outputs and inputs of a tile: 128 words of 8 levels."""
COLS_MULTIPLE = 128
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, eq=False, slots=True)
class MarlinWeight:
    """An int4 weight ``W[N, K] = (q - z) * scale``, rounded to the dtype of ``scale``; q and z integers of 0..15.

    Each product is what the kernel multiplies by, to the bit. Where a level lies, of output n and input k::

        word  [k // 16, n // 64 * 128 + (n % 8 * 4 + k % 8 // 2) * 4 + n % 64 // 16]
        bits  4 * (k % 2 * 4 + n % 16 // 8 * 2 + k % 16 // 8), four of them

    Scales of 64 outputs are transposed as a matrix of 8x8, which gives output n the place ``n // 64 * 64 + n % 8 * 8 +
    n % 64 // 8``; zero points lie in the same order, eight a word, of those eight first the even, then the odd.
    The buffers are allocated once; requantizing writes into them, so their addresses never change.
    """

    packed: torch.Tensor
    """int32 ``[K/16, 2 N]``: words of eight 4-bit levels."""
    placed_scales: torch.Tensor
    """``[K/G, N]`` in the order above; bfloat16, of a float16 weight float16."""
    placed_zeros: torch.Tensor
    """int32 ``[K/G, N/8]``: words of eight 4-bit zero points."""
    out_features: int
    in_features: int
    group_size: int
    dtype: torch.dtype
    """Element type of the weight that was quantized."""

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        group_size: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> MarlinWeight:
        """Buffers for a weight ``[out_features, in_features]``, not yet written. ValueError where ``refusal`` says."""
        if reason := cls.refusal(out_features, in_features, group_size, dtype):
            raise ValueError(f"Marlin has no weight [{out_features}, {in_features}]: {reason}")
        groups = in_features // group_size
        packed = torch.empty((in_features // TILE_COLS, 2 * out_features), dtype=torch.int32, device=device)
        scale_dtype = dtype if dtype in HALF_DTYPES else torch.bfloat16
        scales = torch.empty((groups, out_features), dtype=scale_dtype, device=device)
        zeros = torch.empty((groups, out_features // 8), dtype=torch.int32, device=device)
        return cls(packed, scales, zeros, out_features, in_features, group_size, dtype)

    @staticmethod
    def refusal(out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> str | None:
        """Why the kernel does not take such a weight; None where it does."""
        if dtype not in WEIGHT_DTYPES:
            return f"{dtype}"
        if group_size not in GROUP_SIZES:
            return f"groups of {group_size}, not of {', '.join(map(str, GROUP_SIZES))}"
        if out_features < 1 or out_features % TILE_ROWS or in_features < 1 or in_features % COLS_MULTIPLE:
            return f"N is no multiple of {TILE_ROWS} or K none of {COLS_MULTIPLE}"
        if in_features == group_size:
            return "one group a row, which it reads in another order"
        return None

    def rows(self, first: int, count: int) -> MarlinWeight:
        """Rows ``first .. first + count``, both multiples of 64: a view of the same buffers, which are not contiguous
        then (the kernel itself takes whole weights only)."""
        if first % TILE_ROWS or count % TILE_ROWS or not 0 <= first <= first + count <= self.out_features:
            rows = f"rows {first} to {first + count} of {self.out_features}"
            raise ValueError(f"{rows} are not whole tiles of {TILE_ROWS}")
        last = first + count
        packed, scales = self.packed[:, 2 * first : 2 * last], self.placed_scales[:, first:last]
        zeros = self.placed_zeros[:, first // 8 : last // 8]
        return MarlinWeight(packed, scales, zeros, count, self.in_features, self.group_size, self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        return self.packed, self.placed_scales, self.placed_zeros

    @property
    def nbytes(self) -> int:
        return sum(int(buffer.nbytes) for buffer in self.buffers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.out_features * self.in_features)


QuantizedWeight = PackedWeight | MarlinWeight
Layout = type[PackedWeight] | type[MarlinWeight]
