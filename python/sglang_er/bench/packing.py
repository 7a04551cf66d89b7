"""Remaking the twin in place, against copying as much memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count

from sglang_er import kernels
from sglang_er.bench.linear import GROUP_SIZE, Layer, Weights
from sglang_er.bench.timing import Timing, rotate


@dataclass(frozen=True)
class Packing:
    """Bytes per second, read and written."""

    layer: Layer
    seconds: float
    rate: float
    copy_rate: float

    @property
    def share(self) -> float:
        """Of a copy's."""
        return self.rate / self.copy_rate


def measure(layer: Layer, footprint: int, timing: Timing) -> Packing:
    weights = Weights(layer, footprint).bf16
    outs = [kernels.quantize_pack(weight, GROUP_SIZE) for weight in weights]
    targets = [weight.clone() for weight in weights]  # written once: no page faults in the timing
    pack = [partial(kernels.quantize_pack, weight, GROUP_SIZE, out=out) for weight, out in zip(weights, outs)]
    copy = [partial(target.copy_, weight) for weight, target in zip(weights, targets)]
    position = count()
    seconds = timing.at_most(2).seconds({"pack": rotate(pack, position), "copy": rotate(copy, position)})
    read = weights[0].nbytes
    return Packing(layer, seconds["pack"], (read + outs[0].nbytes) / seconds["pack"], 2 * read / seconds["copy"])
