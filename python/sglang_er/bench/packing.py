"""Remaking the twin in place, against copying as much memory, and with the clip search against without."""

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
    clip_search_seconds: float

    @property
    def share(self) -> float:
        """Of a copy's."""
        return self.rate / self.copy_rate


def measure(layer: Layer, footprint: int, timing: Timing) -> Packing:
    weights = Weights(layer, footprint).bf16
    outs = [kernels.quantize_pack(weight, GROUP_SIZE) for weight in weights]
    targets = [weight.clone() for weight in weights]  # written once: no page faults in the timing
    pack = [partial(kernels.quantize_pack, weight, GROUP_SIZE, out=out) for weight, out in zip(weights, outs)]
    clip = [
        partial(kernels.quantize_pack, weight, GROUP_SIZE, clip_search=True, out=out)
        for weight, out in zip(weights, outs)
    ]
    copy = [partial(target.copy_, weight) for weight, target in zip(weights, targets)]
    position = count()
    works = {"pack": pack, "copy": copy, "clip": clip}
    seconds = timing.at_most(2).seconds({name: rotate(work, position) for name, work in works.items()})
    read = weights[0].nbytes
    rate = (read + outs[0].nbytes) / seconds["pack"]
    return Packing(layer, seconds["pack"], rate, 2 * read / seconds["copy"], seconds["clip"])
