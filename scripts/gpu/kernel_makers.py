"""Random arguments of every op's public checked function, its outputs poisoned before the call, and how far the result
is from the reference in fp64 or, where the bits are fixed, from the reference's bits. `kernel_cases.py` has the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from support.paged_pool import PagedPool, random_pool

from sglang_er import kernels
from sglang_er.kernels import KvShadow, MarlinWeight, PackedWeight, QuantizedWeight
from sglang_er.kernels.kv_shadow import ShadowFormat
from sglang_er.kernels.marlin_weight import Layout

REFERENCE = "reference"
POISON = 0xAA
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Rounding to the output's dtype alone is a third of these; tf32 products for fp32 ones are three times the last.
TOLERANCE = {BF16: 4e-3, FP16: 1e-3, FP32: 1e-4}
# Attention may round its weights to the dtype of the values, as every flash kernel does.
ATTENTION_TOLERANCE = {BF16: 8e-3, FP16: 1e-3, FP32: 1e-4}


@dataclass(frozen=True)
class Draw:
    """Random values; drawn on the CPU, so that a seed means the same everywhere."""

    device: str
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def weight(self, rows: int, cols: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        """As `normal`, on the device: output matrices are large."""
        seed = int(torch.randint(2**31, (), generator=self.generator))
        return torch.randn(rows, cols, generator=torch.Generator(self.device).manual_seed(seed), device=self.device).to(
            dtype
        )

    def coins(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device)


@dataclass(frozen=True)
class Prepared:
    """`call(implementation)` computes into poisoned outputs; `error()` judges what the last call left there."""

    call: Callable[[str], None]
    error: Callable[[], float]
    tolerance: float


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Of the norm; NaN where anything is NaN that should not be."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm())


def different(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Share of the bytes that differ."""
    wrong = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in zip(found, truth))
    return wrong / sum(a.nbytes for a in found)


def _poison(*buffers: torch.Tensor) -> None:
    for buffer in buffers:
        buffer.view(torch.uint8).fill_(POISON)


class Guarded:
    """A matrix within a wider one of NaN: who writes beside it, or not all of it, is found out."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: str, margin: int = 8) -> None:
        self.wide = torch.empty(rows, cols + margin, dtype=dtype, device=device)
        self.out = self.wide[:, :cols]

    def poison(self) -> torch.Tensor:
        self.wide.fill_(math.nan)
        return self.out

    def error(self, truth: torch.Tensor) -> float:
        untouched = bool(self.wide[:, self.out.shape[1] :].isnan().all())
        return relative(self.out, truth) if untouched else math.inf


def quantize_pack(
    rows: int,
    cols: int,
    group: int,
    dtype: torch.dtype,
    clip_search: bool,
    draw: Draw,
    layout: Layout = PackedWeight,
) -> Prepared:
    weight = draw.weight(rows, cols + 8, dtype)[:, :cols]
    weight[0] = 0.5  # a row of one value has no span
    out, truth = (layout.empty(rows, cols, group, dtype, draw.device) for _ in range(2))
    kernels.quantize_pack(weight, group, clip_search=clip_search, out=truth, implementation=REFERENCE)

    def call(implementation: str) -> None:
        _poison(*_buffers(out))
        kernels.quantize_pack(weight, group, clip_search=clip_search, out=out, implementation=implementation)

    return Prepared(call, lambda: different(_buffers(out), _buffers(truth)), 0.0)


def _buffers(weight: QuantizedWeight) -> tuple[torch.Tensor, ...]:
    return (weight.packed, weight.scales_zeros) if isinstance(weight, PackedWeight) else weight.buffers


def w4_linear(
    op: str,
    m: int,
    n: int,
    k: int,
    group: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    draw: Draw,
    layout: Layout = PackedWeight,
) -> Prepared:
    function = getattr(kernels, op)
    live = draw.weight(n, k, dtype if layout is MarlinWeight else BF16)  # Marlin's scales have the dtype of x
    weight = layout.empty(n, k, group, live.dtype, draw.device)
    kernels.quantize_pack(live, group, out=weight, implementation=REFERENCE)
    x = draw.normal(m, k + 8, dtype=dtype)[:, :k]
    added = None if bias is None else draw.normal(n, dtype=bias)
    truth = function(x.double(), weight, None, implementation=REFERENCE)
    truth = truth if added is None else truth + added.double()
    guarded = Guarded(m, n, dtype, draw.device)

    def call(implementation: str) -> None:
        function(x, weight, added, guarded.poison(), implementation=implementation)

    return Prepared(call, lambda: guarded.error(truth), TOLERANCE[dtype])


def w4a16_experts(
    tokens: int, sizes: tuple[int, int, int], choices: int, group: int, dtype: torch.dtype, draw: Draw
) -> Prepared:
    """`sizes`: outputs, inner size, number of experts; of the choices, the last token's first is another rank's."""
    outputs, inner, count = sizes
    gate_up, down = (
        kernels.quantize_pack(draw.weight(rows, cols).mul_(cols**-0.5), group, implementation=REFERENCE)
        for rows, cols in ((count * 2 * inner, outputs), (count * outputs, inner))
    )
    x = draw.normal(tokens, outputs + 8, dtype=dtype)[:, :outputs]
    experts = torch.rand(tokens, count, generator=draw.generator).argsort(-1)[:, :choices].to(draw.device, torch.int32)
    experts[-1, 0] = -1
    weights = torch.rand(tokens, choices, generator=draw.generator).to(draw.device)
    truth = kernels.w4a16_experts(x.double(), gate_up, down, experts, weights, implementation=REFERENCE)
    guarded = Guarded(tokens, outputs, dtype, draw.device)

    def call(implementation: str) -> None:
        kernels.w4a16_experts(x, gate_up, down, experts, weights, guarded.poison(), implementation=implementation)

    # Gate, up, silu and their product may each be rounded between the two products.
    return Prepared(call, lambda: guarded.error(truth), 2 * TOLERANCE[dtype])


def bf16_linear(m: int, n: int, k: int, dtype: torch.dtype, bias: torch.dtype | None, draw: Draw) -> Prepared:
    weight, x = draw.weight(n, k, dtype), draw.normal(m, k + 8, dtype=dtype)[:, :k]
    added = None if bias is None else draw.normal(n, dtype=bias)
    truth = x.double() @ weight.double().T
    truth = truth if added is None else truth + added.double()
    guarded = Guarded(m, n, dtype, draw.device)

    def call(implementation: str) -> None:
        kernels.bf16_linear(x, weight, added, guarded.poison(), implementation=implementation)

    return Prepared(call, lambda: guarded.error(truth), TOLERANCE[dtype])


def dequantize(rows: int, cols: int, group: int, draw: Draw) -> Prepared:
    weight = kernels.quantize_pack(draw.weight(rows, cols), group, implementation=REFERENCE)
    truth = kernels.dequantize(weight, implementation=REFERENCE)
    found: list[torch.Tensor] = []

    def call(implementation: str) -> None:
        found[:] = [kernels.dequantize(weight, implementation=implementation)]

    return Prepared(call, lambda: relative(found[0], truth), 1e-6)


def _pool(
    draw: Draw,
    requests: list[tuple[int, int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    page_size: int,
    window: int,
) -> PagedPool:
    pool = random_pool(
        draw.generator,
        requests,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=heads[2],
        dtype=dtype,
        q_dtype=dtype,
        page_size=page_size,
        window=window,
    )
    return PagedPool(*(tensor.to(draw.device) for tensor in pool.args()))


def _seen(pool: PagedPool) -> torch.Tensor:
    """All slots of the requests, without what lies before a window."""
    slots = torch.cat([pool.slots(index) for index in range(pool.rows.shape[0])])
    return slots[slots < pool.keys.shape[0]]


def paged_attention(
    requests: list[tuple[int, int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    page: int,
    window: int,
    format: ShadowFormat | None,
    draw: Draw,
) -> Prepared:
    """`format`: of a shadow, None for none."""
    pool = _pool(draw, requests, heads, dtype, page, window)
    options = {"scale": heads[2] ** -0.5, "window": window}
    if format:
        shadow = KvShadow.empty(pool.keys.shape[0], heads[1], heads[2], heads[2], format, draw.device)
        _poison(shadow.keys, shadow.values, shadow.key_scales, shadow.value_scales)
        slots = _seen(pool)
        slots = slots[torch.rand(len(slots), generator=draw.generator).to(draw.device) < 0.9]
        kernels.kv_shadow_store(pool.keys, pool.values, slots, shadow, implementation=REFERENCE)
        valid = torch.zeros(pool.keys.shape[0], dtype=torch.uint8, device=draw.device)
        valid[slots] = 1
        options |= {"shadow": shadow, "valid": valid, "exact_newest": 7}
    truth = kernels.paged_attention(*pool.double().args(), implementation=REFERENCE, **options)
    out = torch.empty_like(pool.q)

    def call(implementation: str) -> None:
        out.fill_(math.nan)
        kernels.paged_attention(*pool.args(), out=out, implementation=implementation, **options)

    return Prepared(call, lambda: relative(out, truth), ATTENTION_TOLERANCE[dtype])


def kv_shadow_store(
    tokens: int, kv_heads: int, head_dim: int, format: ShadowFormat, dtype: torch.dtype, draw: Draw
) -> Prepared:
    """Slots that are not named keep their bytes; numbers outside the pool are left out."""
    slots_in_all = 2 * tokens + 3
    keys, values = (draw.normal(slots_in_all, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    slots = torch.randperm(slots_in_all, generator=draw.generator)[:tokens].to(draw.device)
    keys[slots[0]] = 0
    keys[slots[1:], :, 3] *= 1000  # an outlier, which leaves fp8 small and subnormal levels
    buffers = []
    for _ in range(2):
        shadow = KvShadow.empty(slots_in_all, kv_heads, head_dim, head_dim, format, draw.device)
        buffers.append((shadow, (shadow.keys, shadow.values, shadow.key_scales, shadow.value_scales)))
    (found, found_buffers), (truth, truth_buffers) = buffers
    _poison(*truth_buffers)
    kernels.kv_shadow_store(keys, values, slots, truth, implementation=REFERENCE)
    outside = torch.tensor([-1, slots_in_all] if draw.device != "cpu" else [], dtype=torch.int64, device=draw.device)
    named = torch.cat([slots, outside])

    def call(implementation: str) -> None:
        _poison(*found_buffers)
        of = slots if implementation == REFERENCE else named
        kernels.kv_shadow_store(keys, values, of, found, implementation=implementation)

    return Prepared(call, lambda: different(found_buffers, truth_buffers), 0.0)
