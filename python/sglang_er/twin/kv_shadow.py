"""The KV shadow: a quantized copy of the KV pool that only the draft pass reads.

A slot counts only while its flag in `valid` is set. Whoever writes the pool clears the flag; before a draft pass
`refresh` quantizes what the pass will read and is not valid. So a forgotten slot costs time, never a wrong token, and
even a wrong shadow would only cost acceptance: verify reads the pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_er import kernels
from sglang_er.config import ConfigError
from sglang_er.kernels import proven
from sglang_er.kernels.kv_shadow import LEVELS, ShadowFormat

if TYPE_CHECKING:
    from sglang_er.config import RolloutConfig

# Newest tokens that are read exactly: the ones attention looks at most, and all that a step rewrites.
EXACT_NEWEST = 32


def shadow_format(config: RolloutConfig, device: str) -> ShadowFormat | None:
    """Of the option `kv_shadow`; None for off. `auto` on a GPU: once it was seen correct there."""
    if config.kv_shadow == "auto":
        return "int4" if device == "cpu" or proven.KV_SHADOW else None
    return None if config.kv_shadow == "off" else config.kv_shadow


def check_shadow(config: RolloutConfig, device: str) -> None:
    """Raises ConfigError where nothing on the device reads the format: compiled kernels of CPUs know no fp8. (Plain
    torch does, for tests.)"""
    compiled = config.executor == "native" or config.own_kernels
    if config.kv_shadow == "fp8" and device == "cpu" and compiled:
        raise ConfigError("kv_shadow is fp8, which only GPUs read; on a CPU 8 bits are int8: --er-kv-shadow int8")


class ShadowPool:
    """`keys`, `values`: per layer [slots, kv_heads, head_dim]; `valid`: uint8 [slots], shared with the pool's writers.

    Raises ValueError where head_dim does not fit the format.
    """

    def __init__(
        self, keys: list[torch.Tensor], values: list[torch.Tensor], valid: torch.Tensor, format: ShadowFormat
    ) -> None:
        self._pool = list(zip(keys, values, strict=True))
        self.format = format
        self.valid = valid
        valid.zero_()
        self.layers = [
            kernels.KvShadow.empty(key.shape[0], key.shape[1], key.shape[2], value.shape[2], format, key.device)
            for key, value in self._pool
        ]
        self.stored_slots = 0

    def refresh(self, req_to_token: torch.Tensor, rows: torch.Tensor, committed: torch.Tensor) -> None:
        """Make every token valid that lies `EXACT_NEWEST` or more before the end of its request.

        req_to_token int32 [requests, positions]; rows int64 [B]; committed int64 [B].
        """
        ends = (committed - EXACT_NEWEST).tolist()
        slots = [req_to_token[row, :end] for row, end in zip(rows.tolist(), ends, strict=True) if end > 0]
        if not slots:
            return
        wanted = torch.cat(slots).to(torch.int64)
        missing = wanted[self.valid[wanted] == 0].unique()
        if missing.numel() == 0:
            return
        self.store(missing)
        self.stored_slots += missing.numel()

    def store(self, slots: torch.Tensor) -> None:
        """Quantize what the pool holds in these slots, int64 [n], of all layers."""
        for (keys, values), shadow in zip(self._pool, self.layers, strict=True):
            kernels.kv_shadow_store(keys, values, slots, shadow)
        # Not `valid[slots] = 1`: on a GPU that copies the number there and waits, which no graph may record.
        self.valid.index_fill_(0, slots, 1)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers) + self.valid.nbytes

    def describe(self, count: bool = True) -> dict[str, object]:
        """For people; without `count` no flag is looked at."""
        pool = sum(key.nbytes + value.nbytes for key, value in self._pool)
        return {
            "format": self.format,
            "bits": LEVELS[self.format].bits,
            "nbytes": self.nbytes,
            "share_of_kv_pool": round(self.nbytes / pool, 4),
            "stored_slots": self.stored_slots,
            "valid_slots": int(self.valid.sum()) if count else None,
        }
