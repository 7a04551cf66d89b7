"""Linear ops at the layer sizes of real models, ours against PyTorch's.

Weights rotate through more memory than the last-level cache holds, so that every call reads them from memory as a
decode step does; they are random, because constant data is cached and compressed differently. They lie on huge pages,
as the native executor's do (all but those that oneDNN packed, which are its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as functional

from sglang_er import kernels
from sglang_er.bench.stream import Stream
from sglang_er.bench.timing import Run, Timing, rotate
from sglang_er.engine.cpu import huge_pages

GROUP_SIZE = 128
AnyWeight = TypeVar("AnyWeight", bound=kernels.QuantizedWeight)
# A turn should last about as long as reading this much.
_BYTES_A_TURN = 256 << 20


@dataclass(frozen=True)
class Layer:
    """`count`: how often a forward pass has it."""

    name: str
    rows: int
    cols: int
    count: int = 1


@dataclass(frozen=True)
class Cell:
    """One op at one layer and batch. `bytes`: of the weight that it reads; `read`: bytes/s that memory gave then."""

    op: str
    layer: Layer
    batch: int
    seconds: float
    bytes: int
    read: float

    @property
    def share(self) -> float:
        """Of the read bandwidth."""
        return self.bytes / self.seconds / self.read


class Weights:
    """Random weights of one layer in every form that a candidate wants, made when first asked for."""

    def __init__(self, layer: Layer, footprint: int) -> None:
        self.layer, self._footprint = layer, footprint
        self._generator = torch.Generator().manual_seed(layer.rows * 31 + layer.cols)
        weight = torch.randn(layer.rows, layer.cols, generator=self._generator).mul_(0.02).bfloat16()
        self.bf16 = [weight, *(weight.clone() for _ in range(self._copies(weight.nbytes) - 1))]
        huge_pages.back(self.bf16)
        # Where the ops that share a form are in their rotation over its copies.
        self.bf16_position, self.packed_position = count(), count()
        self._packed: list[kernels.QuantizedWeight] = []
        self._int4pack: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _copies(self, nbytes: int) -> int:
        return max(1, -(-self._footprint // nbytes))

    @property
    def packed(self) -> list[kernels.QuantizedWeight]:
        if not self._packed:
            first = kernels.quantize_pack(self.bf16[0], GROUP_SIZE)
            self._packed = [first, *(clone(first) for _ in range(self._copies(first.nbytes) - 1))]
            huge_pages.back(part for weight in self._packed for part in tensors(weight).values())
        return self._packed

    @property
    def int4pack(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """PyTorch's own int4 weights."""
        if not self._int4pack:
            rows, cols = self.layer.rows, self.layer.cols
            levels = torch.randint(0, 16, (rows, cols), dtype=torch.int32, generator=self._generator)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2)
            scales = torch.rand(cols // GROUP_SIZE, rows, 2, generator=self._generator).bfloat16()
            self._int4pack = [(packed.clone(), scales.clone()) for _ in range(self._copies(packed.nbytes))]
            huge_pages.back(part for weight in self._int4pack for part in weight)
        return self._int4pack


def tensors(weight: kernels.QuantizedWeight) -> dict[str, torch.Tensor]:
    """By field."""
    parts = ((field.name, getattr(weight, field.name)) for field in fields(weight))
    return {name: part for name, part in parts if isinstance(part, torch.Tensor)}


def clone(weight: AnyWeight) -> AnyWeight:
    """The same in other memory."""
    return replace(weight, **{name: part.clone() for name, part in tensors(weight).items()})


class Made(NamedTuple):
    """Calls of every copy of the weight, the bytes that one call reads, and the position among the copies."""

    runs: list[Run]
    bytes: int
    position: Iterator[int]


# None: this machine or build lacks the op.
def _functional(x: torch.Tensor, weights: Weights) -> Made:
    runs: list[Run] = [partial(functional.linear, x, w) for w in weights.bf16]
    return Made(runs, weights.bf16[0].nbytes, weights.bf16_position)


def _prepacked(x: torch.Tensor, weights: Weights) -> Made | None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    linear, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
    reordered = [reorder(w, x.shape[0]) for w in weights.bf16]
    runs: list[Run] = [partial(linear, x, w, None, "none", [], "") for w in reordered]
    return Made(runs, weights.bf16[0].nbytes, count())


def _int4pack(x: torch.Tensor, weights: Weights) -> Made | None:
    if weights.layer.cols % GROUP_SIZE or weights.layer.rows % 16:
        return None
    linear = torch.ops.aten._weight_int4pack_mm_for_cpu
    runs: list[Run] = [partial(linear, x, w, GROUP_SIZE, s) for w, s in weights.int4pack]
    return Made(runs, sum(part.nbytes for part in weights.int4pack[0]), count())


def _ours(name: str, packed: bool) -> Callable[[torch.Tensor, Weights], Made | None]:
    def make(x: torch.Tensor, weights: Weights) -> Made | None:
        op = getattr(kernels, name, None)
        if op is None:
            return None
        if packed:
            runs: list[Run] = [partial(op, x, w) for w in weights.packed]
            return Made(runs, weights.packed[0].nbytes, weights.packed_position)
        return Made([partial(op, x, w) for w in weights.bf16], weights.bf16[0].nbytes, weights.bf16_position)

    return make


Make = Callable[[torch.Tensor, Weights], "Made | None"]
THEIRS: dict[str, Make] = {"F.linear": _functional, "mkldnn prepacked": _prepacked, "aten int4pack": _int4pack}
OURS: dict[str, Make] = {
    "bf16_linear": _ours("bf16_linear", packed=False),
    "w4a16_linear": _ours("w4a16_linear", packed=True),
    "w4a8_linear": _ours("w4a8_linear", packed=True),
}


def candidates(x: torch.Tensor, weights: Weights, isas: Sequence[str]) -> dict[str, Made]:
    """By op; ours by op and instruction set where there are several."""
    found: dict[str, Made] = {}
    for name, make in {**THEIRS, **OURS}.items():
        made = make(x, weights)
        if made is None:
            continue
        if name in THEIRS or len(isas) == 1:
            found[name] = made
            continue
        for isa in isas:
            found[f"{name} {isa}"] = made._replace(runs=[partial(_on_isa, isa, run) for run in made.runs])
    return found


def _on_isa(isa: str, run: Run) -> object:
    kernels.set_isa(isa)
    return run()


def measure(
    layer: Layer,
    batches: Sequence[int],
    isas: Sequence[str],
    footprint: int,
    timing: Timing,
    stream: Stream,
) -> Iterator[list[Cell]]:
    """The cells of every batch. Reading `stream` takes turns with the ops: it sees the same disturbances."""
    weights = Weights(layer, footprint)
    timing = timing.at_most(_BYTES_A_TURN // weights.bf16[0].nbytes)
    for batch in batches:
        x = torch.randn(batch, layer.cols, generator=torch.Generator().manual_seed(batch)).bfloat16()
        made = candidates(x, weights, isas)
        seconds = timing.seconds({**_turning(made), **stream.readers()})
        read = stream.rate(seconds)
        yield [Cell(name, layer, batch, seconds[name], made[name].bytes, read) for name in made]


def overhead(timing: Timing) -> dict[str, float]:
    """Seconds of a call on a weight so small that only the call itself is left."""
    weights = Weights(Layer("tiny", 16, GROUP_SIZE), 1)
    made = candidates(torch.ones(1, GROUP_SIZE).bfloat16(), weights, [kernels.isa()])
    return replace(timing, calls=1000).seconds(_turning(made))


def _turning(made: Mapping[str, Made]) -> dict[str, Run]:
    return {name: rotate(one.runs, one.position) for name, one in made.items()}
