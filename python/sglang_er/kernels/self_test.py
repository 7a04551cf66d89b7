"""A few milliseconds of trust: an implementation against the reference, on the device it is about to be used on.

One small case an op, random, with outputs that were not written before. Only the device that it runs on can say whether
a kernel works there; the tests know every shape, and no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.kv_shadow import FORMATS, KvShadow, ShadowFormat
from sglang_er.kernels.reference.choose_seeded import choose_seeded
from sglang_er.kernels.reference.dequantize import dequantize
from sglang_er.kernels.reference.draft_sample import draft_sample
from sglang_er.kernels.reference.kv_shadow_store import kv_shadow_store
from sglang_er.kernels.reference.paged_attention import paged_attention
from sglang_er.kernels.reference.quantize_pack import quantize_pack
from sglang_er.kernels.reference.sample_rows import sample_rows
from sglang_er.kernels.reference.softmax_rows import softmax_rows
from sglang_er.kernels.reference.verify_chain import verify_chain
from sglang_er.kernels.reference.w4a16_experts import w4a16_experts
from sglang_er.kernels.reference.w4a16_linear import w4a16_linear

Function = Callable[..., Any]

_POISON = 0xAA
# Of the largest value; sums differ in their order, results are rounded to the output's type.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


def problem(
    op: str, function: Function, device: str, dtype: torch.dtype, serves: Callable[..., bool] | None = None
) -> str | None:
    """What is wrong with this implementation here; None if nothing is, or if the op has no case. `serves`: whether it
    takes these arguments, None: all."""
    case = _CASES.get(op)
    if case is None:
        return None
    try:
        return case(function, _Draw(device, dtype, serves or (lambda *_: True)))
    except Exception as error:  # whatever it is, another implementation has to compute
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


class _Draw:
    def __init__(self, device: str, dtype: torch.dtype, serves: Callable[..., bool]) -> None:
        self.device, self.dtype, self.serves = device, dtype, serves
        self._generator = torch.Generator().manual_seed(7)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype or self.dtype)

    def coins(self, rows: int) -> torch.Tensor:
        return torch.rand(rows, generator=self._generator, dtype=torch.float64).to(self.device)

    def ints(self, values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def permutation(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randperm(size, generator=self._generator).to(self.device, dtype)


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.uint8).fill_(_POISON)
    return tensor


def _weight(draw: _Draw) -> tuple[torch.Tensor, PackedWeight]:
    weight = draw.normal(80, 384)
    return weight, PackedWeight.empty(weight.shape[0], weight.shape[1], 128, draw.dtype, draw.device)


def _near(result: torch.Tensor, truth: torch.Tensor) -> str | None:
    worst = float((result.double() - truth.double()).abs().amax() / truth.double().abs().amax())
    return None if worst <= _TOLERANCE[result.dtype] else f"off by {worst:.1e} of the largest value"


def _quantize_pack(function: Function, draw: _Draw) -> str | None:
    weight, truth = _weight(draw)
    quantize_pack(weight, truth)
    result = PackedWeight.empty(weight.shape[0], weight.shape[1], 128, draw.dtype, draw.device)
    _poisoned(result.packed), _poisoned(result.scales_zeros)
    function(weight, result)
    same = torch.equal(result.packed, truth.packed) and torch.equal(result.scales_zeros, truth.scales_zeros)
    return None if same else "other bytes than the reference"


def _dequantize(function: Function, draw: _Draw) -> str | None:
    weight, packed = _weight(draw)
    quantize_pack(weight, packed)
    result, truth = (torch.empty(weight.shape, dtype=torch.float32, device=draw.device) for _ in range(2))
    function(packed, _poisoned(result))
    dequantize(packed, truth)
    return _near(result, truth)


def _w4a16_linear(function: Function, draw: _Draw) -> str | None:
    weight, packed = _weight(draw)
    quantize_pack(weight, packed)
    for rows in (1, 5, 17):
        x, bias = draw.normal(rows, weight.shape[1]), draw.normal(weight.shape[0])
        result, truth = (x.new_empty((rows, weight.shape[0])) for _ in range(2))
        function(x, packed, bias, _poisoned(result))
        w4a16_linear(x, packed, bias, truth)
        if found := _near(result, truth):
            return f"{rows} rows: {found}"
    return None


def _w4a16_experts(function: Function, draw: _Draw) -> str | None:
    count, outputs, inner = 3, 80, 72
    gate_up, down = (
        PackedWeight.empty(*size, 64, draw.dtype, draw.device)
        for size in ((count * 2 * inner, outputs), (count * outputs, inner))
    )
    for weight in (gate_up, down):
        quantize_pack(draw.normal(*weight.shape), weight)
    for choices in ([[1, 0]], [[1, 0], [-1, 1], [1, 2], *[[0, -1]] * 20], [[1, 1]] * 9):  # -1: another rank's
        experts = torch.tensor(choices, dtype=torch.int32, device=draw.device)
        x, weights = draw.normal(len(choices), outputs), draw.normal(*experts.shape, dtype=torch.float32)
        result, truth = torch.empty_like(x), torch.empty_like(x)
        function(x, gate_up, down, experts, weights, _poisoned(result))
        w4a16_experts(x, gate_up, down, experts, weights, truth)
        if found := _near(result, truth):
            return f"{len(choices)} rows: {found}"
    return None


def _pool(draw: _Draw) -> tuple[torch.Tensor, torch.Tensor]:
    slots, kv_heads, head_dim = 96, 2, 128
    return draw.normal(slots, kv_heads, head_dim), draw.normal(slots, kv_heads, head_dim)


def _shadow(draw: _Draw, keys: torch.Tensor, format: ShadowFormat) -> KvShadow:
    shadow = KvShadow.empty(keys.shape[0], keys.shape[1], keys.shape[2], keys.shape[2], format, draw.device)
    for buffer in (shadow.keys, shadow.values, shadow.key_scales, shadow.value_scales):
        _poisoned(buffer)
    return shadow


def _kv_shadow_store(function: Function, draw: _Draw) -> str | None:
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


def _paged_attention(function: Function, draw: _Draw) -> str | None:
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
        function(*shared, _poisoned(result))
        paged_attention(*shared, truth)
        if found := _near(result, truth):
            return f"{f'{copy.format} shadow' if copy else 'no shadow'}: {found}"
    return None


def _of_subnormal_levels(shadow: KvShadow) -> KvShadow:
    """Of an fp8 shadow, which has hardly any: a GPU that takes them for zero would not be seen."""
    levels = [codes & 0x87 for codes in (shadow.keys, shadow.values)]
    scales = [torch.full_like(scales, 128.0) for scales in (shadow.key_scales, shadow.value_scales)]
    return replace(shadow, keys=levels[0], values=levels[1], key_scales=scales[0], value_scales=scales[1])


def _softmax_rows(function: Function, draw: _Draw) -> str | None:
    logits = draw.normal(3, 5003)
    temperatures = torch.tensor([0.5, 1.0, 1.7], device=draw.device)
    result, truth = (torch.empty(logits.shape, dtype=torch.float32, device=draw.device) for _ in range(2))
    function(logits, temperatures, _poisoned(result))
    softmax_rows(logits, temperatures, truth)
    return _near(result, truth)


def _sample_rows(function: Function, draw: _Draw) -> str | None:
    weights = draw.normal(4, 3, 5003).float().relu().to(draw.dtype)
    subtract, offsets = weights[:, :2].flip(0).contiguous(), draw.ints([0, 1, 2, 0])
    for of, less, at in ((weights[:, 0].contiguous(), None, None), (weights, subtract, offsets)):
        coins = draw.coins(4)
        result, truth = (torch.empty(4, dtype=torch.int64, device=draw.device) for _ in range(2))
        function(of, less, at, coins, _poisoned(result))
        sample_rows(of, less, at, coins, truth)
        if not torch.equal(result, truth):
            return f"drew {result.tolist()} in place of {truth.tolist()}"
    return None


def _draft_sample(function: Function, draw: _Draw) -> str | None:
    """Without filters, with one, with all; distinct logits where they cut, as equal ones may be cut otherwise."""
    logits = torch.full((4, 1100), -20.0, dtype=draw.dtype, device=draw.device)
    for row in logits:
        row[draw.permutation(1100, torch.int64)[:200]] = torch.arange(200, device=draw.device).to(draw.dtype) / 16
    temperatures = torch.tensor([0.5, 1.0, 1.7, 3.0], device=draw.device)
    filters = (
        draw.ints([1, 0, 20, 199], torch.int32),
        torch.tensor([0.9, 0.3, 0.99, 0.97], device=draw.device),
        torch.tensor([0.0, 0.7, 0.011, 0.0007], device=draw.device),
    )
    for used in ((False,) * 3, (False, True, False), (True,) * 3):
        top_ks, top_ps, min_ps = (column if use else None for column, use in zip(filters, used, strict=True))
        coins = draw.coins(4)
        results, truths = (
            (torch.empty_like(coins, dtype=torch.int64), torch.empty_like(logits, dtype=torch.float32))
            for _ in range(2)
        )
        shared = (logits, temperatures, top_ks, top_ps, min_ps, coins)
        function(*shared, _poisoned(results[0]), _poisoned(results[1]))
        draft_sample(*shared, *truths)
        if not torch.equal(results[1] > 0, truths[1] > 0):
            return f"keeps {(results[1] > 0).sum(-1).tolist()} tokens in place of {(truths[1] > 0).sum(-1).tolist()}"
        if found := _near(results[1], truths[1]):
            return found
        if not torch.equal(results[0], truths[0]):
            return f"drew {results[0].tolist()} in place of {truths[0].tolist()}"
    return None


def _choose_seeded(function: Function, draw: _Draw) -> str | None:
    logits, temperatures = draw.normal(6, 5003), torch.linspace(0.3, 1.7, 6, device=draw.device)
    seeds, positions = draw.ints([0, 42, 2**40 + 5, 2**62 + 7, 1, 2**31]), draw.ints([0, 7, 511, 1, 40000, 3])
    result, truth = (torch.empty(6, dtype=torch.int64, device=draw.device) for _ in range(2))
    function(logits, temperatures, seeds, positions, _poisoned(result))
    choose_seeded(logits, temperatures, seeds, positions, truth)
    return None if torch.equal(result, truth) else f"chose {result.tolist()} in place of {truth.tolist()}"


def _verify_chain(function: Function, draw: _Draw) -> str | None:
    p, q = (draw.normal(4, width, 5003).float().relu().to(draw.dtype) for width in (4, 3))
    drafts = _drafts_of(q)
    coins = draw.coins(16).view(4, 4)
    for accept in (coins[:, :3].contiguous(), torch.zeros_like(coins[:, :3])):  # some kept, all kept
        results, truths = (
            (torch.empty((4, 4), dtype=torch.int64, device=draw.device), draw.ints([0] * 4, torch.int32))
            for _ in range(2)
        )
        function(p, q, drafts, accept, coins[:, 3].contiguous(), _poisoned(results[0]), _poisoned(results[1]))
        verify_chain(p, q, drafts, accept, coins[:, 3].contiguous(), *truths)
        if not all(torch.equal(result, truth) for result, truth in zip(results, truths, strict=True)):
            return f"committed {results[0].tolist()} in place of {truths[0].tolist()}"
    return None


def _drafts_of(q: torch.Tensor) -> torch.Tensor:
    """A draft per row that q gives some weight: int64 [rows, drafts]."""
    return torch.stack([row.nonzero()[7 + place, 0] for rows in q for place, row in enumerate(rows)]).view(q.shape[:2])


_CASES: dict[str, Callable[[Function, _Draw], str | None]] = {
    "quantize_pack": _quantize_pack,
    "dequantize": _dequantize,
    "w4a16_linear": _w4a16_linear,
    "w4a16_experts": _w4a16_experts,
    "kv_shadow_store": _kv_shadow_store,
    "paged_attention": _paged_attention,
    "softmax_rows": _softmax_rows,
    "sample_rows": _sample_rows,
    "draft_sample": _draft_sample,
    "choose_seeded": _choose_seeded,
    "verify_chain": _verify_chain,
}
