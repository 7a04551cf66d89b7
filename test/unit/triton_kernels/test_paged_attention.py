"""The Triton paged_attention against the reference in fp64, over pools and shadows poisoned with NaN."""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import pytest
import torch
from support.paged_pool import PagedPool, random_pool

from sglang_er.kernels import KvShadow
from sglang_er.kernels.kv_shadow import FORMATS, ShadowFormat
from sglang_er.kernels.reference import kv_shadow_store as reference_store
from sglang_er.kernels.reference import paged_attention as reference
from sglang_er.kernels.triton import paged_attention as module

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Relative rounding of an operand: p always, q where it is rotated.
ROUNDING = {BF16: 2.0**-9, FP16: 2.0**-12, FP32: 2.0**-24}
REQUESTS = [(66, 2), (5, 0), (1, 1)]


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many splits, several a lane, in contexts that the interpreter can walk."""
    monkeypatch.setattr(module, "SPLIT", 64)
    monkeypatch.setattr(module, "LANES", 3)


def shadowed(
    pool: PagedPool, format: ShadowFormat, generator: torch.Generator, share: float
) -> tuple[KvShadow, torch.Tensor]:
    """A shadow of a random share of the slots in use and their flags; the others are poisoned: random levels, NaN."""
    slots, kv_heads, head_dim = pool.keys.shape
    shadow = KvShadow.empty(slots, kv_heads, head_dim, pool.values.shape[2], format)
    for tensor in (shadow.keys, shadow.values):
        tensor.fill_(77)
    for tensor in (shadow.key_scales, shadow.value_scales):
        tensor.fill_(float("nan"))
    used = ~pool.keys.isnan().flatten(1).any(dim=1)
    valid = (torch.rand(len(used), generator=generator) < share) & used
    reference_store.kv_shadow_store(pool.keys, pool.values, valid.nonzero().flatten(), shadow)
    return shadow, valid.to(torch.uint8)


def attend(
    pool: PagedPool,
    window: int = -1,
    shadow: KvShadow | None = None,
    valid: torch.Tensor | None = None,
    exact_newest: int = 0,
    out: torch.Tensor | None = None,
    function=module.paged_attention,
) -> torch.Tensor:
    if out is None:
        shape = (*pool.q.shape[:2], pool.values.shape[2])
        out = torch.full(shape, float("nan"), dtype=torch.promote_types(pool.q.dtype, FP32))
    function(*pool.args(), pool.q.shape[2] ** -0.5, window, shadow, valid, exact_newest, out)
    return out


def check(pool: PagedPool, window: int = -1, **kwargs) -> torch.Tensor:
    """Errors relative to the terms of a score and to the values, as far as operands and fp32 sums round them."""
    expected = attend(pool.double(), window, **kwargs, function=reference.paged_attention)
    actual = attend(pool, window, **kwargs)
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return actual
    scores = pool.q.double().norm(dim=2).max() * pool.keys.double().nan_to_num(0.0).norm(dim=2).max()
    scores *= pool.q.shape[2] ** -0.5
    largest = pool.values.double().nan_to_num(0.0).abs().max()
    operand = ROUNDING[FP32 if pool.q.dtype != pool.keys.dtype else pool.q.dtype]
    shadow = kwargs.get("shadow")
    if shadow is not None:  # p * scale is bf16, for fp16 too; the rotated q errs at random, so by its norm / sqrt(dim)
        operand = max(operand, ROUNDING[FP32 if pool.q.dtype == FP32 else BF16])
        rotated = ROUNDING[pool.q.dtype] * scores * 2 * 3 * pool.q.shape[2] ** -0.5 if shadow.format == "int4" else 0.0
    else:
        rotated = 0.0
    bound = (operand + rotated + 2.0**-21 * (1 + scores)) * largest
    worst = float(((actual.double() - expected).abs() / bound).max())
    assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
    return actual


@pytest.mark.parametrize(
    ("heads", "dtype"), [((2, 2), FP32), ((4, 2), BF16), ((7, 1), BF16), ((8, 1), BF16), ((17, 1), FP32)], ids=str
)
def test_equals_reference(generator, heads, dtype):
    check(random_pool(generator, REQUESTS, heads=heads[0], kv_heads=heads[1], dtype=dtype, q_dtype=dtype))


@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (96, 72), (128, 128), (40, 256), (256, 24)], ids=str)
def test_dimensions(generator, dims):
    check(random_pool(generator, [(70, 1), (17, 1)], kv_heads=1, head_dim=dims[0], value_dim=dims[1], q_dtype=BF16))


@pytest.mark.parametrize(
    ("q_dtype", "dtype"), [(BF16, BF16), (FP16, FP16), (BF16, FP16), (FP32, BF16), (BF16, FP32)], ids=str
)
@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_types_of_query_and_pool(generator, format, q_dtype, dtype):
    pool = random_pool(generator, [(70, 1)], kv_heads=1, dtype=dtype, q_dtype=q_dtype)
    shadow, valid = shadowed(pool, format, generator, 0.6)
    check(pool, shadow=shadow, valid=valid, exact_newest=5)


def test_output_is_rounded_once(generator):
    pool = random_pool(generator, [(70, 2)], q_dtype=BF16, strided=True)
    exact = attend(pool)
    wide = torch.full((2, 4 * 64 + 40), float("nan"), dtype=BF16)
    rounded = attend(pool, out=wide[:, 16:272].unflatten(1, (4, 64)))
    assert torch.equal(exact.to(BF16), rounded)
    assert wide[:, :16].isnan().all() and wide[:, 272:].isnan().all()  # nothing written beside the output


@pytest.mark.parametrize(("share", "exact_newest"), [(1.0, 0), (0.6, 3)])
@pytest.mark.parametrize(
    ("format", "dims"),
    [
        *[("int8", dims) for dims in ((64, 64), (24, 80))],
        *[("fp8", dims) for dims in ((64, 64), (24, 80), (128, 32), (256, 8))],
        *[("int4", dims) for dims in ((64, 64), (128, 32), (96, 96), (32, 160))],
    ],
)
def test_shadow_equals_reference(generator, format, dims, share, exact_newest):
    pool = random_pool(
        generator, [(100, 1), (20, 1)], heads=7, kv_heads=1, head_dim=dims[0], value_dim=dims[1], q_dtype=BF16
    )
    shadow, valid = shadowed(pool, format, generator, share)
    check(pool, shadow=shadow, valid=valid, exact_newest=exact_newest)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_fp8_that_the_gpu_converts_gives_the_same_bits(generator, monkeypatch, dtype):
    pool = random_pool(
        generator, [(100, 1), (20, 1)], kv_heads=1, head_dim=24, value_dim=80, dtype=dtype, q_dtype=dtype
    )
    shadow, valid = shadowed(pool, "fp8", generator, 0.6)
    by_bits = attend(pool, shadow=shadow, valid=valid, exact_newest=3)
    monkeypatch.setattr(module, "converts_fp8", lambda device: True)
    assert torch.equal(attend(pool, shadow=shadow, valid=valid, exact_newest=3), by_bits)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)], ids=str)
def test_shadow_in_fp32(generator, heads, format):
    """Nothing but sums is rounded, so a level or a scale in the wrong place shows."""
    pool = random_pool(generator, REQUESTS, heads=heads[0], kv_heads=heads[1], dtype=FP32)
    shadow, valid = shadowed(pool, format, generator, 0.8)
    check(pool, shadow=shadow, valid=valid, exact_newest=20)


@pytest.mark.parametrize("window", [0, 1, 64, 100, 1000])
def test_windows(generator, short_splits, window):
    pool = random_pool(generator, [(150, 1), (66, 1)], kv_heads=1, window=window)
    check(pool, window)
    shadow, valid = shadowed(pool, "int4", generator, 0.7)
    check(pool, window, shadow=shadow, valid=valid, exact_newest=9)


@pytest.mark.parametrize("context", [64, 65, 193, 300])
def test_splits_and_lanes(generator, short_splits, context):
    pool = random_pool(generator, [(context, 1)], kv_heads=1, dtype=FP32)
    check(pool)
    shadow, valid = shadowed(pool, "int8", generator, 0.9)
    check(pool, shadow=shadow, valid=valid, exact_newest=3)


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_batch_and_number_of_queries_do_not_matter(generator, short_splits, monkeypatch, format):
    """The promise behind verification: a token decoded alone and one verified among others get the same bits."""
    requests = [(210, 3), (5, 2), (20, 0)]
    pool = random_pool(generator, requests, heads=3, kv_heads=1, head_dim=32, q_dtype=BF16)
    quantized = {}
    if format:
        shadow, valid = shadowed(pool, format, generator, 0.9)
        quantized = {"shadow": shadow, "valid": valid, "exact_newest": 24}
    whole = attend(pool, **quantized)
    monkeypatch.setattr(module, "_PROGRAMS", 1)
    monkeypatch.setattr(module, "_MIN_PROGRAMS_A_TOKEN", 1)  # lanes one after another
    monkeypatch.setattr(module, "_SCRATCH", 3 * 3 * (32 + 2) * 4 * 2)  # two tokens a launch
    assert torch.equal(attend(pool, **quantized), whole)
    for index in range(len(requests)):
        own = whole[pool.query_begin[index] : pool.query_begin[index + 1]]
        assert torch.equal(attend(pool.request(index), **quantized), own)
        if len(own):
            assert torch.equal(attend(pool.request(index, 1), **quantized), own[-1:])
    if not format:  # a shorter context, whose last token is verified above
        for back in (1, 2):
            assert torch.equal(attend(pool.request(0, 1, 210 - back)), whole[2 - back : 3 - back])


@pytest.mark.parametrize("format", FORMATS)
def test_what_the_shadow_lacks_is_read_exactly(generator, short_splits, format):
    pool = random_pool(generator, [(200, 1), (64, 1)], kv_heads=1, q_dtype=BF16)
    exact = attend(pool)
    shadow, _ = shadowed(pool, format, generator, 0.0)
    slots = len(pool.keys)
    nothing, everything = torch.zeros(slots, dtype=torch.uint8), torch.ones(slots, dtype=torch.uint8)
    without = attend(pool, shadow=shadow, valid=nothing)
    assert torch.equal(attend(pool, shadow=shadow, valid=everything, exact_newest=1000), without)
    # Another kernel, which may add in another order: int4 takes the dimensions of a value in its own halves.
    assert (without - exact).abs().max() < 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_exact_newest_is_honoured_to_the_token(generator, format):
    """The newest n slots poisoned in the shadow, the older ones in the pool: nothing of either may be read."""
    pool = random_pool(generator, [(150, 1)], kv_heads=1, q_dtype=BF16)
    shadow, valid = shadowed(pool, format, generator, 1.0)
    slots = pool.slots(0)
    for count in (1, 64, 86):
        expected = attend(pool, shadow=shadow, valid=valid, exact_newest=count)
        keys, values, scales = pool.keys.clone(), pool.values.clone(), shadow.key_scales.clone()
        keys[slots[: 150 - count]] = values[slots[: 150 - count]] = float("nan")
        scales[slots[150 - count :]] = float("nan")
        marked = replace(shadow, key_scales=scales)
        actual = attend(replace(pool, keys=keys, values=values), shadow=marked, valid=valid, exact_newest=count)
        assert torch.equal(actual, expected) and not actual.isnan().any()


def test_what_is_not_finite_stays_where_it_is_seen(generator):
    """A later token's key is not touched for an earlier one: 0 * NaN would be NaN. Nor does a query reach others."""
    pool = random_pool(generator, [(70, 4)], kv_heads=1, q_dtype=BF16)
    clean = attend(pool)
    slots = pool.slots(0)[68:]
    pool.keys[slots], pool.values[slots] = float("nan"), float("inf")
    pool.q[0, 1, 5] = float("nan")
    out = attend(pool)
    assert torch.equal(out[1], clean[1]) and out[2:].isnan().all() and out[0, 1].isnan().all()
    assert torch.equal(out[0, [0, 2, 3]], clean[0, [0, 2, 3]])


def test_large_scores_do_not_overflow(generator):
    pool = random_pool(generator, [(100, 2)])
    large = replace(pool, q=pool.q * 1e4)
    expected = attend(large.double(), function=reference.paged_attention)
    assert (attend(large).double() - expected).abs().max() < 1e-2


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_values_of_any_size_in_a_shadow(generator, scale):
    """Their scales meet p before they are rounded to 16 bits."""
    pool = random_pool(generator, [(70, 1)], dtype=BF16, q_dtype=FP16)
    pool = replace(pool, values=pool.values * scale)
    shadow, valid = shadowed(pool, "int4", generator, 1.0)
    check(pool, shadow=shadow, valid=valid)


def test_no_requests_and_no_queries(generator):
    pool = random_pool(generator, [(30, 0), (20, 0)])
    assert attend(pool).shape == (0, 4, 64)
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = replace(pool, rows=nothing, context_lens=nothing, query_begin=torch.zeros(1, dtype=torch.int64))
    assert attend(empty).shape == (0, 4, 64)
