"""What the CUDA wrappers take, as far as it can be seen without a GPU."""

from __future__ import annotations

import pytest
import torch
from support.on_gpu import on_gpu

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cpu.loader import LibraryError
from sglang_er.kernels.cuda import (
    dequant_attention,
    kv_shadow_store,
    loader,
    quantize_pack,
    w4_linear,
    w4a8_linear,
    w4a16_linear,
)
from sglang_er.kernels.cuda.specs import SPECS, arch_of
from sglang_er.kernels.kv_shadow import FORMATS, KvShadow


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "arch", lambda device: arch_of((9, 0)))


def linear_arguments(rows: int = 3, dtype: torch.dtype = torch.bfloat16, group_size: int = 128):
    weight = PackedWeight.empty(48, 256, group_size)
    return on_gpu(torch.zeros(rows, 256, dtype=dtype)), weight, None, on_gpu(torch.zeros(rows, 48, dtype=dtype))


@pytest.mark.parametrize("linear", [w4a16_linear, w4a8_linear])
def test_linear_serves_sixteen_bit_inputs_in_groups_of_128(linear):
    assert linear.serves(*linear_arguments())
    assert linear.serves(*linear_arguments(dtype=torch.float16))
    assert linear.serves(*linear_arguments(rows=w4_linear.MOST_ROWS))
    assert not linear.serves(*linear_arguments(dtype=torch.float32))
    assert not linear.serves(*linear_arguments(group_size=64))
    assert not linear.serves(*linear_arguments(rows=w4_linear.MOST_ROWS + 1))


def test_int8_takes_outputs_and_biases_of_the_kernels_types_alone():
    """The op itself takes any on a CPU."""
    x, weight, _, out = linear_arguments()
    assert w4a8_linear.serves(x, weight, torch.zeros(48), out)
    assert not w4a8_linear.serves(x, weight, torch.zeros(48).half(), out)
    assert not w4a8_linear.serves(x, weight, None, out.float())


def test_pack_serves_groups_of_64_and_128():
    weight = on_gpu(torch.zeros(48, 256))
    served = [
        (size, clip_search)
        for size in (32, 64, 96, 128, 256)
        for clip_search in (False, True)
        if quantize_pack.serves(weight, clip_search, PackedWeight.empty(48, 256, size))
    ]
    assert served == [(64, False), (64, True), (128, False), (128, True)]


def test_shadows_are_stored_in_every_format_and_attention_reads_int4():
    pool = on_gpu(torch.zeros(40, 2, 128, dtype=torch.bfloat16))
    q = on_gpu(torch.zeros(1, 8, 128, dtype=torch.bfloat16))
    table, one = torch.zeros(1, 40, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
    begin, valid = torch.tensor([0, 1]), torch.ones(40, dtype=torch.uint8)
    shadows = {format: KvShadow.empty(40, 2, 128, 128, format) for format in FORMATS}
    assert all(kv_shadow_store.serves(pool, pool, one, shadow) for shadow in shadows.values())
    call = (q, pool, pool, table, one, begin, one, 1.0, -1)
    assert [format for format in FORMATS if dequant_attention.serves(*call, shadows[format], valid, 0, q)] == ["int4"]


def test_nothing_serves_a_cpu_or_an_unknown_gpu(monkeypatch: pytest.MonkeyPatch):
    x, weight, bias, out = linear_arguments()
    plain = torch.zeros(48, 256)
    assert not w4a16_linear.serves(x.as_subclass(torch.Tensor), weight, bias, out)
    assert not quantize_pack.serves(plain, False, weight)
    monkeypatch.setattr(loader, "arch", lambda device: arch_of((7, 5)))
    assert not w4a16_linear.serves(x, weight, bias, out)
    assert not quantize_pack.serves(on_gpu(plain), False, weight)


def test_what_is_not_served_is_an_error_that_says_so():
    with pytest.raises(TypeError, match="does not serve"):
        w4a16_linear.w4a16_linear(*linear_arguments(group_size=64))
    with pytest.raises(TypeError, match="does not serve"):
        quantize_pack.quantize_pack(torch.zeros(48, 256), False, PackedWeight.empty(48, 256, 128))


def test_a_gpu_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "arch", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(LibraryError, match=r"compute capability 7\.5"):
        loader.module.__wrapped__("quantize_pack", torch.device("cuda", 0))


def test_capabilities_have_targets():
    found = {capability: arch_of(capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))}
    assert [arch.sm if arch else None for arch in found.values()] == ["sm_80", None, "sm_90a", "sm_100", "sm_100", None]


def test_specs_have_names_of_their_own():
    assert len({spec.name for spec in SPECS}) == len(SPECS)
