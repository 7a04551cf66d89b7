"""Types and argument checks shared by every implementation of every op."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_BLOCK = 16
"""Rows (outputs) packed together: the lanes of a 512-bit register."""
GROUP_MULTIPLE = 32
MAX_GROUP_SIZE = 1024
WEIGHT_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, eq=False, slots=True)
class PackedWeight:
    """An int4 weight ``W[N, K] = q * scale + zero`` in the layout of ``csrc/include/sglang_er/packed_weight.h``.

    The buffers are allocated once; requantizing writes into them, so their addresses never change.
    """

    packed: torch.Tensor
    """uint8 ``[N/16, K/G, G/8, 16, 4]``: 32-bit words of eight 4-bit levels."""
    scales_zeros: torch.Tensor
    """bfloat16 ``[N/16, K/G, 2, 16]``: scale in ``[:, :, 0]``, zero in ``[:, :, 1]``."""
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
    ) -> PackedWeight:
        """Buffers for a weight ``[out_features, in_features]``, not yet written."""
        check_group_size(group_size)
        blocks = -(-out_features // ROW_BLOCK)
        groups = -(-in_features // group_size)
        packed = torch.empty((blocks, groups, group_size // 8, ROW_BLOCK, 4), dtype=torch.uint8, device=device)
        scales_zeros = torch.empty((blocks, groups, 2, ROW_BLOCK), dtype=torch.bfloat16, device=device)
        return cls(packed, scales_zeros, out_features, in_features, group_size, dtype)

    def rows(self, first: int, count: int) -> PackedWeight:
        """Rows ``first .. first + count``, both multiples of 16: a view of the same buffers."""
        if first % ROW_BLOCK or count % ROW_BLOCK or not 0 <= first <= first + count <= self.out_features:
            rows = f"rows {first} to {first + count} of {self.out_features}"
            raise ValueError(f"{rows} are not whole blocks of {ROW_BLOCK}")
        blocks = slice(first // ROW_BLOCK, (first + count) // ROW_BLOCK)
        packed, scales = self.packed[blocks], self.scales_zeros[blocks]
        return PackedWeight(packed, scales, count, self.in_features, self.group_size, self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self.scales_zeros.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.out_features * self.in_features)

    @property
    def scales(self) -> torch.Tensor:
        """bfloat16 ``[N, K/G]`` (a copy)."""
        return self._by_row(0)

    @property
    def zeros(self) -> torch.Tensor:
        """bfloat16 ``[N, K/G]`` (a copy)."""
        return self._by_row(1)

    def _by_row(self, index: int) -> torch.Tensor:
        values = self.scales_zeros[:, :, index].transpose(1, 2)
        return values.reshape(-1, values.shape[2])[: self.out_features]


def check_group_size(group_size: int) -> None:
    if group_size <= 0 or group_size % GROUP_MULTIPLE or group_size > MAX_GROUP_SIZE:
        raise ValueError(f"group_size {group_size} is not a multiple of {GROUP_MULTIPLE} in 32..{MAX_GROUP_SIZE}")


def check_matrix(name: str, tensor: torch.Tensor, rows: int | None, cols: int | None) -> None:
    """``tensor`` is a matrix of that shape (None: any) whose rows are contiguous; rows may lie any distance apart."""
    shape = tensor.shape
    if len(shape) != 2 or rows not in (None, shape[0]) or cols not in (None, shape[1]):
        raise ValueError(f"{name} has shape {list(shape)}, expected [{rows or 'any'}, {cols or 'any'}]")
    stride = tensor.stride()
    if stride[1] != 1 and shape[1] > 1:
        raise ValueError(f"{name} has strides {stride}, its rows must be contiguous")
    if stride[0] < shape[1] and shape[0] > 1:
        raise ValueError(f"{name} has strides {stride}, its rows must not overlap")


def check_vector(name: str, tensor: torch.Tensor, size: int) -> None:
    if tensor.shape != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected a contiguous [{size}]")


def check_weights(name: str, tensor: torch.Tensor, dims: int, rows: int, size: int) -> None:
    """``tensor`` is ``[rows, ..., size]``, contiguous and not empty in the last dimension only."""
    shape = tensor.shape
    if len(shape) != dims or shape[0] != rows or shape[-1] != size or size == 0:
        raise ValueError(f"{name} has shape {list(shape)}, expected {dims} dimensions, [{rows}, ..., {size or '> 0'}]")
    if tensor.stride(-1) != 1 and size > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}, its last dimension must be contiguous")


def check_dtype(name: str, tensor: torch.Tensor, allowed: frozenset[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} is {tensor.dtype}, expected one of {sorted(map(str, allowed))}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
