"""A few milliseconds of trust: an implementation against the reference, on the device it is about to be used on.

One small case an op, random, with outputs that were not written before. Only the device that it runs on can say whether
a kernel works there; the tests know every shape, and no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from sglang_er.kernels import self_test_sampling
from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.kv_shadow import FORMATS, KvShadow, ShadowFormat
from sglang_er.kernels.marlin_weight import MarlinWeight, QuantizedWeight
from sglang_er.kernels.reference.dequantize import dequantize
from sglang_er.kernels.reference.kv_shadow_store import kv_shadow_store
from sglang_er.kernels.reference.paged_attention import paged_attention
from sglang_er.kernels.reference.quantize_pack import quantize_pack
from sglang_er.kernels.reference.w4a8_linear import w4a8_linear
from sglang_er.kernels.reference.w4a16_experts import w4a16_experts
from sglang_er.kernels.reference.w4a16_linear import w4a16_linear
from sglang_er.kernels.self_test_draw import Draw, Function, near, poisoned, reference_of

_NOTHING_TRIED = "it takes none of the weights that it was to be tried with"


def problem(
    op: str, function: Function, device: str, dtype: torch.dtype, serves: Callable[..., bool] | None = None
) -> str | None:
    """What is wrong with this implementation here; None if nothing is, or if the op has no case. `serves`: whether it
    takes these arguments, None: all."""
    case = _CASES.get(op)
    if case is None:
        return None
    try:
        return case(function, Draw(device, dtype, serves or (lambda *_: True)))
    except Exception as error:  # whatever it is, another implementation has to compute
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def _weight(draw: Draw) -> tuple[torch.Tensor, PackedWeight]:
    weight = draw.normal(80, 384)
    return weight, PackedWeight.empty(weight.shape[0], weight.shape[1], 128, draw.dtype, draw.device)


def _weights(draw: Draw) -> Iterator[tuple[torch.Tensor, Callable[[], QuantizedWeight]]]:
    """A weight, and what makes buffers for it, in every layout; of Marlin's two sizes, which it cuts differently."""
    for kind, rows in ((PackedWeight, 80), (MarlinWeight, 192), (MarlinWeight, 256)):
        weight = draw.normal(rows, 384)
        yield weight, partial(kind.empty, rows, weight.shape[1], 128, draw.dtype, draw.device)


def _buffers(weight: QuantizedWeight) -> tuple[torch.Tensor, ...]:
    return (weight.packed, weight.scales_zeros) if isinstance(weight, PackedWeight) else weight.buffers


def _quantize_pack(function: Function, draw: Draw) -> str | None:
    tried = False
    for weight, empty in _weights(draw):
        result, truth = empty(), empty()
        for clip_search in (False, True) if isinstance(truth, PackedWeight) else (False,):
            if not draw.serves(weight, clip_search, result):
                continue
            tried = True
            quantize_pack(weight, clip_search, truth)
            for buffer in _buffers(result):
                poisoned(buffer)
            function(weight, clip_search, result)
            pairs = zip(_buffers(result), _buffers(truth), strict=True)
            if not all(torch.equal(found.view(torch.uint8), true.view(torch.uint8)) for found, true in pairs):
                return f"{'with' if clip_search else 'without'} clip search: other bytes than the reference"
    return None if tried else _NOTHING_TRIED


def _dequantize(function: Function, draw: Draw) -> str | None:
    weight, packed = _weight(draw)
    quantize_pack(weight, False, packed)
    result, truth = (torch.empty(weight.shape, dtype=torch.float32, device=draw.device) for _ in range(2))
    function(packed, poisoned(result))
    dequantize(packed, truth)
    return near(result, truth)


def _linear(reference: Function, function: Function, draw: Draw) -> str | None:
    tried = False
    for weight, empty in _weights(draw):
        packed = empty()
        quantize_pack(weight, False, packed)
        for rows in (1, 5, 17, 70):
            x, bias = draw.normal(rows, weight.shape[1]), draw.normal(weight.shape[0])
            result, truth = (x.new_empty((rows, weight.shape[0])) for _ in range(2))
            if not draw.serves(x, packed, bias, result):
                continue
            tried = True
            function(x, packed, bias, poisoned(result))
            reference_of(reference, x, packed, bias, truth)
            if found := near(result, truth):
                return f"{rows} rows: {found}"
    return None if tried else _NOTHING_TRIED


# (experts, K, I, group) and who chooses whom, -1: another rank's. The second one's K takes several steps, of as many
# buffers of shared memory as a kernel ever asks for: with few pairs of an expert, and with a large block of them.
_MIXTURES: tuple[tuple[tuple[int, int, int, int], tuple[list[list[int]], ...]], ...] = (
    ((3, 80, 72, 64), ([[1, 0]], [[1, 0], [-1, 1], [1, 2], *[[0, -1]] * 20], [[1, 1]] * 9)),
    ((2, 3120, 16, 128), ([[1]], [[1], *[[0]] * 19])),
)


def mixtures(device: str) -> tuple[tuple[tuple[int, int, int, int], tuple[list[list[int]], ...]], ...]:
    """All on a GPU; on a CPU the small one, as the interpreter takes seconds for the other."""
    return _MIXTURES if device.startswith("cuda") else _MIXTURES[:1]


def _w4a16_experts(function: Function, draw: Draw) -> str | None:
    for (count, outputs, inner, group), batches in mixtures(draw.device):
        gate_up, down = (
            PackedWeight.empty(*size, group, draw.dtype, draw.device)
            for size in ((count * 2 * inner, outputs), (count * outputs, inner))
        )
        for weight in (gate_up, down):
            quantize_pack(draw.normal(*weight.shape), False, weight)
        for choices in batches:
            experts = torch.tensor(choices, dtype=torch.int32, device=draw.device)
            x = draw.normal(len(choices), outputs) * (80 / outputs) ** 0.5  # results that fp16 holds
            weights = draw.normal(*experts.shape, dtype=torch.float32)
            result, truth = torch.empty_like(x), torch.empty_like(x)
            function(x, gate_up, down, experts, weights, poisoned(result))
            reference_of(w4a16_experts, x, gate_up, down, experts, weights, truth)
            if found := near(result, truth):
                return f"{len(choices)} rows of {outputs}: {found}"
    return None


def _pool(draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    slots, kv_heads, head_dim = 96, 2, 128
    return draw.normal(slots, kv_heads, head_dim), draw.normal(slots, kv_heads, head_dim)


def _shadow(draw: Draw, keys: torch.Tensor, format: ShadowFormat) -> KvShadow:
    shadow = KvShadow.empty(keys.shape[0], keys.shape[1], keys.shape[2], keys.shape[2], format, draw.device)
    for buffer in (shadow.keys, shadow.values, shadow.key_scales, shadow.value_scales):
        poisoned(buffer)
    return shadow


def _kv_shadow_store(function: Function, draw: Draw) -> str | None:
    keys, values = _pool(draw)
    slots = draw.ints([3, 90, 4, 41, 0])
    for format in FORMATS:
        result, truth = _shadow(draw, keys, format), _shadow(draw, keys, format)
        if not draw.serves(keys, values, slots, result):
            continue
        function(keys, values, slots, result)
        kv_shadow_store(keys, values, slots, truth)
        for name in ("keys", "values", "key_scales", "value_scales"):
            if not torch.equal(getattr(result, name).view(torch.uint8), getattr(truth, name).view(torch.uint8)):
                return f"{format}: other {name} than the reference"
    return None


def _paged_attention(function: Function, draw: Draw) -> str | None:
    keys, values = _pool(draw)
    table = draw.permutation(keys.shape[0], torch.int32).view(2, -1)
    rows, begin, lens = draw.ints([1, 0]), draw.ints([0, 1, 2]), draw.ints([47, 19])
    valid = torch.ones(keys.shape[0], dtype=torch.uint8, device=draw.device)
    valid[::5] = 0
    every = torch.arange(keys.shape[0], device=draw.device)
    shadows = {format: _shadow(draw, keys, format) for format in FORMATS}
    for shadow in shadows.values():
        kv_shadow_store(keys, values, every, shadow)
    for copy in (None, *shadows.values(), _of_subnormal_levels(shadows["fp8"])):
        q = draw.normal(2, 8, keys.shape[2])
        result, truth = torch.empty_like(q), torch.empty_like(q)
        shared = (q, keys, values, table, rows, begin, lens, keys.shape[2] ** -0.5, -1, copy, valid, 4)
        if not draw.serves(*shared, result):
            continue
        function(*shared, poisoned(result))
        reference_of(paged_attention, *shared, truth)
        if found := near(result, truth):
            return f"{f'{copy.format} shadow' if copy else 'no shadow'}: {found}"
    return None


def _of_subnormal_levels(shadow: KvShadow) -> KvShadow:
    """Of an fp8 shadow, which has hardly any: a GPU that takes them for zero would not be seen."""
    levels = [codes & 0x87 for codes in (shadow.keys, shadow.values)]
    scales = [torch.full_like(scales, 128.0) for scales in (shadow.key_scales, shadow.value_scales)]
    return replace(shadow, keys=levels[0], values=levels[1], key_scales=scales[0], value_scales=scales[1])


_CASES: dict[str, Callable[[Function, Draw], str | None]] = {
    "quantize_pack": _quantize_pack,
    "dequantize": _dequantize,
    "w4a16_linear": partial(_linear, w4a16_linear),
    "w4a8_linear": partial(_linear, w4a8_linear),
    "w4a16_experts": _w4a16_experts,
    "kv_shadow_store": _kv_shadow_store,
    "paged_attention": _paged_attention,
    **self_test_sampling.CASES,
}
