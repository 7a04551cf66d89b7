"""kv_shadow_store against the reference, and paged_attention that reads the shadow, for every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_pool import PagedPool, random_pool

from sglang_er import kernels
from sglang_er.kernels import KvShadow, kv_shadow_store, paged_attention
from sglang_er.kernels.kv_shadow import ShadowFormat
from sglang_er.kernels.reference.kv_shadow_store import dequantize_keys, dequantize_values, rotate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
REQUESTS = [(700, 1), (600, 5), (40, 40), (513, 2), (20, 0)]
ACCUMULATION = 2.0**-23


def poisoned(pool: PagedPool, format: ShadowFormat) -> KvShadow:
    """Levels of any kind, scales NaN: what was not stored must not be read."""
    slots, kv_heads, head_dim = pool.keys.shape
    shadow = KvShadow.empty(slots, kv_heads, head_dim, pool.values.shape[2], format)
    for tensor in (shadow.keys, shadow.values):
        tensor.fill_(77)
    for tensor in (shadow.key_scales, shadow.value_scales):
        tensor.fill_(float("nan"))
    return shadow


def shadowed(
    pool: PagedPool, format: ShadowFormat, generator: torch.Generator, share: float
) -> tuple[KvShadow, torch.Tensor]:
    """A shadow of a random share of the slots in use, and their flags."""
    shadow = poisoned(pool, format)
    used = ~pool.keys.isnan().flatten(1).any(dim=1)
    valid = (torch.rand(len(used), generator=generator) < share) & used
    kv_shadow_store(pool.keys, pool.values, valid.nonzero().flatten(), shadow)
    return shadow, valid.to(torch.uint8)


def attend(pool: PagedPool, window: int = -1, **kwargs) -> torch.Tensor:
    return paged_attention(*pool.args(), scale=pool.q.shape[2] ** -0.5, window=window, **kwargs)


def check(pool: PagedPool, shadow: KvShadow, valid: torch.Tensor, exact_newest: int, window: int = -1) -> torch.Tensor:
    quantized = {"shadow": shadow, "valid": valid, "exact_newest": exact_newest, "window": window}
    expected = attend(pool.double(), **quantized, implementation="reference")
    actual = attend(pool, **quantized, out=torch.full(expected.shape, float("nan")))
    if expected.numel():
        largest = float(pool.values.nan_to_num(0.0).abs().max())
        norms = [float(tensor.double().nan_to_num(0.0).norm(dim=2).max()) for tensor in (pool.q, pool.keys)]
        bound = ACCUMULATION * (1 + 2 * pool.q.shape[2] ** -0.5 * norms[0] * norms[1]) * largest
        worst = (actual.double() - expected).abs().max() / bound
        assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "dims"),
    [("int8", (64, 64)), ("int8", (24, 80)), ("int4", (128, 128)), ("int4", (96, 32)), ("int4", (32, 64))],
)
def test_store_equals_reference(isa, generator, format, dims, dtype):
    pool = random_pool(generator, [(50, 1), (33, 1)], head_dim=dims[0], value_dim=dims[1], dtype=dtype, strided=True)
    used = (~pool.keys.isnan().flatten(1).any(dim=1)).nonzero().flatten()
    pool.keys[used[0]], pool.values[used[1]] = 0.0, 0.0
    pool.keys[used[2], 0, 3] = 3000.0  # an outlier
    shadow, expected = poisoned(pool, format), poisoned(pool, format)
    slots = used[torch.randperm(len(used), generator=generator)][:60]
    kv_shadow_store(pool.keys, pool.values, slots, shadow)
    kv_shadow_store(pool.keys, pool.values, slots, expected, implementation="reference")
    for name in ("keys", "values"):
        assert torch.equal(getattr(shadow, name), getattr(expected, name))
    for name in ("key_scales", "value_scales"):  # those of the other slots are still NaN
        assert torch.equal(getattr(shadow, name).view(torch.int16), getattr(expected, name).view(torch.int16))


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.5 / 127 * 1.01), ("int4", 0.5 / 8 * 1.1)])
def test_error_of_a_level_is_bounded(generator, format, bound):
    """Half a step of the largest entry of the row; more by the rounding of the scale to bf16."""
    pool = random_pool(generator, [(200, 1)], head_dim=128, dtype=torch.float32)
    shadow, valid = shadowed(pool, format, generator, 1.0)
    used = valid.nonzero().flatten()
    keys = rotate(pool.keys[used]) if format == "int4" else pool.keys[used]
    for exact, levels in ((keys, dequantize_keys), (pool.values[used], dequantize_values)):
        error = (levels(shadow, torch.float32)[used] - exact).abs() / exact.abs().amax(dim=2, keepdim=True)
        assert error.max() < bound


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.02), ("int4", 0.2)])
def test_error_of_attention(isa, generator, format, bound):
    """Relative (Frobenius) error over random data, whose weights are nearly uniform: the worst case for values."""
    pool = random_pool(generator, [(900, 2), (300, 1)], head_dim=128, heads=8, kv_heads=4)
    shadow, valid = shadowed(pool, format, generator, 1.0)
    exact = attend(pool)
    assert (attend(pool, shadow=shadow, valid=valid) - exact).norm() < bound * exact.norm()


def test_rotation_saves_keys_with_an_outlier(generator):
    """One dimension 30 times the others, as keys of real models have: without rotation 4 bits lose the rest."""
    pool = random_pool(generator, [(400, 1)], head_dim=128, dtype=torch.float32)
    pool.keys[:, :, 17] *= 30.0
    shadow, valid = shadowed(pool, "int4", generator, 1.0)
    used = valid.nonzero().flatten()
    keys = pool.keys[used]
    lost = (rotate(dequantize_keys(shadow, torch.float32)[used]) - keys).norm() / keys.norm()
    assert lost < 0.12
    assert torch.allclose(rotate(rotate(keys)), keys, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "dims"),
    [("int8", (64, 64)), ("int8", (24, 72)), ("int4", (64, 64)), ("int4", (128, 32)), ("int4", (32, 96))],
)
@pytest.mark.parametrize("share", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)], ids=str)
def test_equals_reference(isa, generator, heads, share, format, dims):
    pool = random_pool(
        generator, [(700, 1), (70, 5), (40, 40)], heads=heads[0], kv_heads=heads[1], head_dim=dims[0], value_dim=dims[1]
    )
    shadow, valid = shadowed(pool, format, generator, share)
    for exact_newest in (0, 33, 1000):
        check(pool, shadow, valid, exact_newest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_pool_dtypes_windows_and_strides(isa, generator, format, dtype):
    pool = random_pool(generator, [(600, 3), (90, 90)], dtype=dtype, window=70, strided=True)
    shadow, valid = shadowed(pool, format, generator, 0.7)
    check(pool, shadow, valid, 20, window=70)


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("heads", [(2, 2), (14, 2)], ids=str)
def test_what_the_shadow_lacks_is_read_exactly(isa, generator, heads, format):
    pool = random_pool(generator, REQUESTS, heads=heads[0], kv_heads=heads[1])
    exact = attend(pool)
    shadow = poisoned(pool, format)
    slots = len(pool.keys)
    nothing, everything = torch.zeros(slots, dtype=torch.uint8), torch.ones(slots, dtype=torch.uint8)
    assert torch.equal(attend(pool, shadow=shadow, valid=nothing), exact)
    assert torch.equal(attend(pool, shadow=shadow, valid=everything, exact_newest=700), exact)
    # Within a window that only sees the newest tokens the rest may be anything, even in the same vector of keys.
    newest = attend(pool, shadow=shadow, valid=everything, exact_newest=40 + 30, window=30)
    assert torch.equal(newest, attend(pool, window=30))


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_exact_newest_is_honoured_to_the_token(isa, generator, format):
    """The newest n slots poisoned in the shadow, the next one in the pool: nothing of either may be read."""
    pool = random_pool(generator, [(300, 2)])
    shadow, valid = shadowed(pool, format, generator, 1.0)
    slots = pool.slots(0)
    for count in (1, 2, 16, 17, 100, 299):
        expected = attend(pool, shadow=shadow, valid=valid, exact_newest=count)
        keys, scales = pool.keys.clone(), shadow.key_scales.clone()
        keys[slots[: 300 - count]] = float("nan")
        scales[slots[300 - count :]] = float("nan")
        marked = replace(shadow, key_scales=scales)
        actual = attend(replace(pool, keys=keys), shadow=marked, valid=valid, exact_newest=count)
        assert torch.equal(actual, expected) and not actual.isnan().any()


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_batch_and_threads_do_not_matter(isa, generator, format, share):
    pool = random_pool(generator, REQUESTS, heads=6, kv_heads=2)
    shadow, valid = shadowed(pool, format, generator, share)
    quantized = {"shadow": shadow, "valid": valid, "exact_newest": 24}
    whole = attend(pool, **quantized)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(attend(pool, **quantized), whole)
        for index in range(len(REQUESTS)):
            own = whole[pool.query_begin[index] : pool.query_begin[index + 1]]
            assert torch.equal(attend(pool.request(index), **quantized), own)
            if len(own):  # fewer query tokens of the same context
                assert torch.equal(attend(pool.request(index, 1), **quantized), own[-1:])


@pytest.mark.parametrize("dims", [64, 128])
def test_size(dims):
    pool_bytes = 2 * 2 * 10 * 3 * dims
    assert KvShadow.empty(10, 3, dims, dims, "int4").nbytes <= 0.27 * pool_bytes
    for format in ("int8", "fp8"):
        assert KvShadow.empty(10, 3, dims, dims, format).nbytes <= 0.52 * pool_bytes


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_fuzz(data):
    draw = data.draw
    requests = draw(st.lists(st.tuples(st.integers(1, 700), st.integers(0, 20)), min_size=1, max_size=3))
    requests = [(context, min(context, queries)) for context, queries in requests]
    kv_heads, format = draw(st.integers(1, 3)), draw(st.sampled_from(["int4", "int8"]))
    step = 32 if format == "int4" else 8
    window = draw(st.sampled_from([-1, -1, 0, 50]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pool = random_pool(
        generator,
        requests,
        heads=kv_heads * draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=step * draw(st.integers(1, 128 // step)),
        value_dim=step * draw(st.integers(1, 128 // step)),
        dtype=draw(st.sampled_from(DTYPES)),
        window=window,
    )
    before = kernels.isa()
    kernels.set_isa(draw(st.sampled_from(kernels.supported_isas())))
    try:
        shadow, valid = shadowed(pool, format, generator, draw(st.sampled_from([1.0, 0.97, 0.3])))
        check(pool, shadow, valid, draw(st.sampled_from([0, 1, 64, 300])), window)
    finally:
        kernels.set_isa(before)


def test_bad_input_is_one_line(generator):
    pool = random_pool(generator, [(30, 4)], head_dim=64)
    shadow, valid = shadowed(pool, "int8", generator, 1.0)
    keys, values, none = pool.keys, pool.values, torch.zeros(0, dtype=torch.int64)
    cases = [
        (lambda: KvShadow.empty(4, 2, 64, 64, "int3"), "is one of int8, int4, fp8, not 'int3'"),
        (lambda: KvShadow.empty(4, 2, 80, 64, "int4"), "multiples of 32, not 80 and 64"),
        (lambda: kv_shadow_store(keys, values, none.int(), shadow), "slots is torch.int32"),
        (lambda: kv_shadow_store(keys, values, torch.tensor([33]), shadow), "slot 33 is outside the pool of 33"),
        (lambda: kv_shadow_store(keys, values, torch.tensor([-1]), shadow), "slot -1 is outside"),
        (lambda: kv_shadow_store(keys[1:], values[1:], none, shadow), "shadow was made for"),
        (lambda: kv_shadow_store(keys.double(), values.double(), none, shadow), "keys is torch.float64"),
        (lambda: kv_shadow_store(keys, values.half(), none, shadow), "values is torch.float16"),
        (lambda: attend(pool, shadow=shadow), "valid is missing"),
        (lambda: attend(pool, shadow=shadow, valid=valid.bool()), "valid is torch.bool"),
        (lambda: attend(pool, shadow=shadow, valid=valid[1:]), r"valid is torch.uint8 \[32\]"),
        (lambda: attend(pool, shadow=shadow, valid=valid, exact_newest=-1), "exact_newest -1 is negative"),
        (lambda: attend(pool, shadow=KvShadow.empty(33, 1, 64, 64, "int8"), valid=valid), "shadow was made for"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            call()
        assert "\n" not in str(error.value)
