"""The fp8 shadow of the reference, which every kernel is compared with: its numbers, its error, and who reads it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_pool import PagedPool, random_pool

from sglang_er.kernels import KvShadow, kv_shadow_store, paged_attention
from sglang_er.kernels.kv_shadow import ShadowFormat
from sglang_er.kernels.reference.kv_shadow_store import dequantize_keys, dequantize_values, fp8_codes

LARGEST_CODE = 0x7E
# e4m3fn by its definition: 4 bits of exponent (bias 7), 3 of mantissa, no infinity; 0x7F is NaN.
NUMBERS = torch.tensor(
    [(code & 7) / 512 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10) for code in range(0x7F)],
    dtype=torch.float64,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def stored(keys: torch.Tensor, values: torch.Tensor, format: ShadowFormat = "fp8") -> KvShadow:
    """All slots of a pool, in buffers that were poisoned before."""
    shadow = KvShadow.empty(*keys.shape, values.shape[2], format)
    for buffer in (shadow.keys, shadow.values, shadow.key_scales, shadow.value_scales):
        buffer.view(torch.uint8).fill_(0xFF)  # NaN
    kv_shadow_store(keys, values, torch.arange(len(keys)), shadow, implementation="reference")
    return shadow


def attend(pool: PagedPool, **options) -> torch.Tensor:
    out = torch.full((*pool.q.shape[:2], pool.values.shape[2]), float("nan"))
    scale = pool.q.shape[2] ** -0.5
    return paged_attention(*pool.args(), scale=scale, out=out, implementation="reference", **options)


def used_slots(pool: PagedPool) -> torch.Tensor:
    return (~pool.keys.isnan().flatten(1).any(dim=1)).nonzero().flatten()


def shadowed(pool: PagedPool, format: ShadowFormat = "fp8") -> dict[str, object]:
    """Of all slots in use; the others are poisoned and not valid."""
    shadow = KvShadow.empty(*pool.keys.shape, pool.values.shape[2], format)
    shadow.keys.fill_(0x7F), shadow.values.fill_(0x7F)
    shadow.key_scales.fill_(float("nan")), shadow.value_scales.fill_(float("nan"))
    slots = used_slots(pool)
    kv_shadow_store(pool.keys, pool.values, slots, shadow, implementation="reference")
    valid = torch.zeros(len(pool.keys), dtype=torch.uint8)
    valid[slots] = 1
    return {"shadow": shadow, "valid": valid}


def test_codes_are_the_nearest_numbers_ties_to_even():
    """Every finite bf16 number: those that e4m3 has, what lies in the middle, and either side of it."""
    numbers = torch.arange(0x10000, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    numbers = numbers[numbers.isfinite()]
    distance = (numbers.double().abs().clamp(max=448.0)[:, None] - NUMBERS).abs()
    nearest = distance == distance.amin(dim=1, keepdim=True)
    even = torch.arange(0x7F) % 2 == 0
    expected = torch.where(nearest, torch.where(even, 0, 1), 2).argmin(dim=1) | numbers.signbit().int() << 7
    assert torch.equal(fp8_codes(numbers).int(), expected)


def test_codes_are_those_of_the_compiled_kernels():
    """test/native/test_fp8.cpp has the same sum."""
    numbers = torch.arange(0x10000, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    total = 0
    for code in fp8_codes(numbers[numbers.isfinite()]).tolist():
        total = (total * 31 + code) % 1_000_000_007
    assert total == 925820336


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(8, 24), (64, 64), (40, 256)], ids=str)
@pytest.mark.parametrize("power", [-120, -20, 0, 10, 110])
def test_error_is_a_seventeenth_at_most_and_the_largest_value_does_not_saturate(generator, power, dims, dtype):
    """One outlier of 3000 times the others in some rows, a row of zeros."""
    if dtype == torch.float16:
        power = max(-8, min(power, 4))
    for dim, dequantize, part in ((dims[0], dequantize_keys, 0), (dims[1], dequantize_values, 1)):
        rows = torch.randn(30, 3, dim, generator=generator)
        rows[::3, :, 1] *= 3000.0 if dtype != torch.float16 else 50.0
        rows[5] = 0.0
        rows = (rows * 2.0**power).to(dtype)
        other = torch.ones(30, 3, 8, dtype=dtype)
        shadow = stored(*((rows, other) if part == 0 else (other, rows)))
        codes, scales = (shadow.keys, shadow.key_scales) if part == 0 else (shadow.values, shadow.value_scales)
        exact, found = rows.double(), dequantize(shadow, torch.float64)
        bound = torch.maximum(exact.abs() / 17, scales.double()[..., None] / 1024) * (1 + 1e-6)
        assert ((found - exact).abs() <= bound).all()
        magnitudes, largest = codes & 0x7F, exact.abs().amax(dim=2, keepdim=True)
        assert (magnitudes <= LARGEST_CODE).all()
        if power > -100:  # scales end at 2^-126
            assert (magnitudes[(exact.abs() == largest) & (largest > 0)] == LARGEST_CODE).all()
        assert (codes[5] == 0).all() and (scales[5] == 2.0**-126).all()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gives_no_code_that_is_nan_and_stays_in_its_vector(generator, odd):
    rows = torch.randn(4, 2, 16, generator=generator)
    clean = stored(rows, rows)
    wrong = rows.clone()
    wrong[1, 0, 3] = odd
    shadow = stored(wrong, wrong)
    for codes, scales, before, scales_before in (
        (shadow.keys, shadow.key_scales, clean.keys, clean.key_scales),
        (shadow.values, shadow.value_scales, clean.values, clean.value_scales),
    ):
        assert ((codes & 0x7F) <= LARGEST_CODE).all()
        others = torch.ones(4, 2, dtype=torch.bool)
        others[1, 0] = False
        assert torch.equal(codes[others], before[others]) and torch.equal(scales[others], scales_before[others])


def test_subnormal_numbers_of_the_pool():
    """Of fp32, below the smallest scale: codes count from nothing again."""
    rows = torch.full((2, 1, 8), 2.0**-140)
    rows[1] = 2.0**-130
    shadow = stored(rows, rows)
    assert (shadow.keys[0] == 0).all() and (shadow.key_scales == 2.0**-126).all()
    assert (dequantize_keys(shadow, torch.float64)[1] == 2.0**-130).all()


def test_error_of_attention(generator):
    """Random normal keys and values, whose weights are nearly uniform: the worst case. It is in docs/kernels.md."""
    pool = random_pool(generator, [(900, 2), (300, 1)], head_dim=128, heads=8, kv_heads=4)
    exact = attend(pool)
    error = float((attend(pool, **shadowed(pool)) - exact).norm() / exact.norm())
    assert 0.02 < error < 0.045, error


def test_an_outlier_costs_the_other_dimensions_nothing(generator):
    """One dimension 100 times the others: int8 loses what is small, fp8 does not. It is in docs/kernels.md."""
    rows = torch.randn(400, 2, 128, generator=generator)
    rows[:, :, 17] *= 100.0
    small = torch.arange(128) != 17
    lost = {}
    for format in ("int8", "fp8"):
        found = dequantize_keys(stored(rows, rows, format), torch.float32)
        lost[format] = float((found - rows)[..., small].norm() / rows[..., small].norm())
    assert lost["fp8"] < 0.03 and lost["int8"] > 0.2, lost


@pytest.mark.parametrize("page_size", [1, 16])
def test_valid_flags_and_exact_newest_are_honoured_to_the_token(generator, page_size):
    """What is to come from the pool is poisoned in the shadow, and the other way round: nothing of either is read."""
    pool = random_pool(generator, [(100, 2), (37, 1)], head_dim=24, value_dim=40, page_size=page_size)
    options = shadowed(pool)
    assert torch.equal(attend(pool, **options, exact_newest=100), attend(pool))
    valid = options["valid"] * (torch.arange(len(pool.keys)) % 3 != 0)
    options["valid"] = valid.to(torch.uint8)
    expected = attend(pool, **options, exact_newest=9)
    assert not expected.isnan().any() and not torch.equal(expected, attend(pool))
    from_shadow = torch.zeros(len(pool.keys), dtype=torch.bool)
    for index in range(2):
        slots = pool.slots(index)[:-9]
        from_shadow[slots[valid[slots] == 1]] = True
    keys, values = pool.keys.clone(), pool.values.clone()
    keys[from_shadow], values[from_shadow] = float("nan"), float("nan")
    shadow = options["shadow"]
    codes, scales = shadow.keys.clone(), shadow.value_scales.clone()
    codes[~from_shadow], scales[~from_shadow] = 0x7F, float("nan")
    options["shadow"] = replace(shadow, keys=codes, value_scales=scales)
    assert torch.equal(attend(replace(pool, keys=keys, values=values), **options, exact_newest=9), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_error_of_any_vector(data):
    """Of any finite fp32 numbers, subnormal ones and extremes among them."""
    dim = 8 * data.draw(st.integers(1, 3))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = torch.tensor(data.draw(st.lists(numbers, min_size=dim, max_size=dim)), dtype=torch.float32).view(1, 1, dim)
    shadow = stored(rows, rows)
    assert ((shadow.keys & 0x7F) <= LARGEST_CODE).all()
    found, exact, scale = dequantize_keys(shadow, torch.float64), rows.double(), float(shadow.key_scales)
    # A product with an inverse that was rounded: some parts in ten million more.
    assert ((found - exact).abs() <= torch.maximum(exact.abs() / 17, torch.tensor(scale / 1024)) * (1 + 1e-6)).all()
    assert torch.equal(shadow.keys, shadow.values) and torch.equal(shadow.key_scales, shadow.value_scales)


def test_compiled_kernels_say_that_they_do_not_serve_it(generator):
    pool = random_pool(generator, [(30, 4)])
    options = shadowed(pool)
    for call in (
        lambda: kv_shadow_store(pool.keys, pool.values, torch.tensor([1]), options["shadow"]),
        lambda: paged_attention(*pool.args(), scale=1.0, **options),
    ):
        with pytest.raises(TypeError, match="served by none of cpu") as error:
            call()
        assert "\n" not in str(error.value)
