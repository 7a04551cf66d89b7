"""In which layout a weight is packed: that of the first implementation that takes it, if somebody multiplies by it."""

from __future__ import annotations

import functools
import logging

import torch

from sglang_er.kernels import registry
from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.marlin_weight import Layout, MarlinWeight

logger = logging.getLogger(__name__)

MARLIN = "marlin"


def layout_for(weight: torch.Tensor, group_size: int, names: str | None = None) -> Layout:
    """The class whose ``empty`` makes buffers for a weight ``[N, K]``. `names`: who may pack, given with the call;
    without it, who may compute at all (``SGLANG_ER_KERNELS``), so that all weights of a process are packed by one rule.

    Who is asked may be tried on the device first, which allocates. Raises ValueError where Marlin's layout is asked for
    and nobody that is named can multiply by it.
    """
    rows, cols = weight.shape
    for entry in registry.candidates("quantize_pack", weight.device.type, weight.dtype, names):
        if entry.name != MARLIN:
            break
        reason = MarlinWeight.refusal(rows, cols, group_size, weight.dtype)
        if reason is None and (names or _multiplied(weight.device.type, weight.dtype)):
            return MarlinWeight
        if reason:
            if names:  # nobody else is asked
                raise TypeError(f"quantize_pack: marlin does not serve [{rows}, {cols}]: {reason}")
            _say_refused(rows, cols, reason)
    return PackedWeight


def _multiplied(device: str, dtype: torch.dtype) -> bool:
    """Whether somebody multiplies by Marlin's layout: its kernel; on a CPU, where there is none, plain torch."""
    able = {entry.name for entry in registry.candidates("w4a16_linear", device, dtype)}
    if device == "cpu" and registry.REFERENCE not in able:
        raise ValueError("Marlin has no kernel for CPUs, where only plain torch reads its weights: name reference too")
    return MARLIN in able or device == "cpu"


@functools.cache
def _say_refused(rows: int, cols: int, reason: str) -> None:
    """Once for each shape."""
    logger.info(
        "quantize_pack: weights [%d, %d] keep our own layout, Marlin does not take them: %s", rows, cols, reason
    )
