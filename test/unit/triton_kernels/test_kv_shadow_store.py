"""The Triton kv_shadow_store gives the reference's bits, and writes nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_er.kernels import KvShadow
from sglang_er.kernels.kv_shadow import FORMATS, LEVELS, ShadowFormat
from sglang_er.kernels.reference import kv_shadow_store as reference
from sglang_er.kernels.triton import kv_shadow_store as triton_store
from sglang_er.kernels.triton.rotation import rotation_norm, rotation_steps

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PARTS = ("keys", "values", "key_scales", "value_scales")


def poisoned(slots: int, kv_heads: int, head_dim: int, value_dim: int, format: ShadowFormat) -> KvShadow:
    shadow = KvShadow.empty(slots, kv_heads, head_dim, value_dim, format)
    for name in PARTS:
        getattr(shadow, name).view(torch.uint8).fill_(0xAA)
    return shadow


def random_pool(seed: int, slots: int, kv_heads: int, dim: int, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((slots, kv_heads * dim + (24 if strided else 0)), float("nan"))
    wide[:, : kv_heads * dim] = torch.randn(slots, kv_heads * dim, generator=generator)
    return wide.to(dtype)[:, : kv_heads * dim].unflatten(1, (kv_heads, dim))


def check(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, format: ShadowFormat) -> None:
    shape = (keys.shape[0], keys.shape[1], keys.shape[2], values.shape[2], format)
    actual, expected = poisoned(*shape), poisoned(*shape)
    triton_store.kv_shadow_store(keys, values, slots, actual)
    reference.kv_shadow_store(keys, values, slots, expected)
    for name in PARTS:
        same = getattr(actual, name).view(torch.uint8) == getattr(expected, name).view(torch.uint8)
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} bytes differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "dims"),
    [
        *[("int4", dims) for dims in ((64, 64), (128, 128), (96, 32), (32, 160), (256, 64))],
        *[("int8", dims) for dims in ((64, 64), (128, 128), (96, 80), (40, 24), (8, 256))],
        *[("fp8", dims) for dims in ((128, 128), (96, 80), (40, 24), (8, 256))],
    ],
    ids=str,
)
def test_same_bits_as_the_reference(format, dims, dtype):
    seed = sum(dims) + LEVELS[format].bits
    keys = random_pool(seed, 60, 3, dims[0], dtype, strided=True)
    values = random_pool(seed + 1, 60, 3, dims[1], dtype, strided=True)
    keys[0], values[1] = 0.0, 0.0
    keys[2, 1, 3] = 3000.0  # an outlier
    values[3, 0] *= 2.0**-20
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    check(keys, values, torch.cat([torch.arange(4), slots[slots >= 4][:33]]), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("power", [-126, -60, 60, 120])
def test_scales_at_the_edges_of_the_range(format, power):
    """Tiny rows get the smallest scale, whose inverse is still finite; large ones do not overflow."""
    keys = random_pool(power, 8, 2, 64, torch.float32, strided=False) * 2.0**power
    check(keys, keys.flip(0).contiguous(), torch.arange(8), format)


def test_levels_on_the_boundary_round_to_even():
    """Scale 1 exactly: 0.5, 1.5, ... are ties."""
    values = torch.zeros(4, 1, 64)
    values[:, 0, 0] = 127.0
    values[:, 0, 1:] = torch.arange(63) - 31.5
    check(values, values, torch.arange(4), "int8")
    shadow = KvShadow.empty(4, 1, 64, 64, "int8")
    triton_store.kv_shadow_store(values, values, torch.arange(4), shadow)
    assert shadow.values[0, 0, 30:36].tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("count", [0, 1, 5, 16, 17])
def test_any_number_of_slots(count):
    """A slot's result does not depend on the others: all sizes give what the whole pool gives."""
    keys = random_pool(1, 20, 1, 64, torch.bfloat16, strided=False)
    values = random_pool(2, 20, 1, 64, torch.bfloat16, strided=False)
    slots = torch.arange(19, -1, -1)[:count]
    check(keys, values, slots, "int4")
    whole, part = poisoned(20, 1, 64, 64, "int4"), poisoned(20, 1, 64, 64, "int4")
    triton_store.kv_shadow_store(keys, values, torch.arange(20), whole)
    triton_store.kv_shadow_store(keys, values, slots, part)
    for name in PARTS:
        assert torch.equal(getattr(part, name)[slots].view(torch.uint8), getattr(whole, name)[slots].view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_slots_outside_the_pool_are_left_out(format):
    """Padding of a batch: nothing is read nor written there, before, behind or in the pool."""
    keys = random_pool(3, 24, 2, 64, torch.bfloat16, strided=True)
    values = random_pool(4, 24, 2, 64, torch.bfloat16, strided=True)
    # The kernel is given the middle of all: what it does outside would be seen, or read as NaN.
    inner = slice(4, 20)
    whole, expected = poisoned(24, 2, 64, 64, format), poisoned(16, 2, 64, 64, format)
    shadow = replace(whole, **{name: getattr(whole, name)[inner] for name in PARTS})
    slots = torch.tensor([3, -1, 0, 16, -4, 15, 19, 1 << 40, -(1 << 40), 7])
    triton_store.kv_shadow_store(keys[inner], values[inner], slots, shadow)
    reference.kv_shadow_store(keys[inner], values[inner], torch.tensor([3, 0, 15, 7]), expected)
    for name in PARTS:
        found = getattr(whole, name).view(torch.uint8)
        assert (found[:4] == 0xAA).all() and (found[20:] == 0xAA).all(), name
        assert torch.equal(found[inner], getattr(expected, name).view(torch.uint8)), name


@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (128, 128), (96, 32), (160, 32), (256, 256)])
def test_rotation_constants(head_dim, block):
    assert 2 ** rotation_steps(head_dim) == block
    expected = torch.ones(()) / torch.tensor(float(block)).sqrt()
    assert torch.tensor(rotation_norm(head_dim)) == expected


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_no_fp8_code_is_nan(odd):
    """Nor does a vector that is not finite reach others."""
    keys = random_pool(5, 6, 2, 24, torch.float32, strided=False)
    wrong = keys.clone()
    wrong[2, 1, 7] = odd
    clean, shadow = poisoned(6, 2, 24, 24, "fp8"), poisoned(6, 2, 24, 24, "fp8")
    triton_store.kv_shadow_store(keys, keys, torch.arange(6), clean)
    triton_store.kv_shadow_store(wrong, wrong, torch.arange(6), shadow)
    assert ((shadow.keys & 0x7F) < 0x7F).all() and ((shadow.values & 0x7F) < 0x7F).all()
    others = torch.ones(6, 2, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(shadow.keys[others], clean.keys[others])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_fp8_of_any_numbers_has_the_bits_of_the_reference(data):
    """Subnormal numbers and extremes among them."""
    dim = 8 * data.draw(st.integers(1, 2))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    count = 2 * dim
    rows = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count)), dtype=torch.float32)
    check(rows.view(2, 1, dim), rows.flip(0).view(2, 1, dim), torch.arange(2), "fp8")
