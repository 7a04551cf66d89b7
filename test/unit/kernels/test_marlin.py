"""Marlin's layout: every level where SGLang's kernel looks for it, the error that rounding promises, who is asked."""

from __future__ import annotations

import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sglang_er import kernels
from sglang_er.kernels import MarlinWeight, PackedWeight, dequantize, formats, quantize_pack, registry, w4a16_linear
from sglang_er.kernels.marlin import loader
from sglang_er.kernels.marlin import quantize_pack as chunks
from sglang_er.kernels.marlin import w4a16_linear as binding
from sglang_er.kernels.marlin import workspace as workspaces
from sglang_er.kernels.reference import marlin as reference

MARLIN = "marlin"
SHAPES = [(64, 128, 32), (192, 384, 128), (128, 256, 64), (320, 2048, 128)]


def random_levels(rows: int, cols: int, group: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    levels = torch.randint(16, (rows, cols), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (rows, cols // group), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, cols // group, generator=generator).add_(0.5).bfloat16()
    return levels, scales, zeros


def weight_of(levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """fp32, so that quantizing gives exactly these levels: each group has level 0 and 15."""
    group = levels.shape[1] // scales.shape[1]
    steps = levels.float().unflatten(1, (-1, group)) - zeros.float().unsqueeze(2)
    return (steps * scales.float().unsqueeze(2)).flatten(1)


def both(weight: torch.Tensor, group: int) -> MarlinWeight:
    """Packs with the fast code and the reference, into poisoned buffers, and compares the bytes."""
    found, truth = (MarlinWeight.empty(*weight.shape, group, weight.dtype) for _ in range(2))
    for implementation, out in ((MARLIN, found), ("reference", truth)):
        for buffer in out.buffers:
            buffer.view(torch.uint8).fill_(0xA5)
        quantize_pack(weight, group, out=out, implementation=implementation)
    for fast, slow in zip(found.buffers, truth.buffers, strict=True):
        assert torch.equal(fast.view(torch.uint8), slow.view(torch.uint8))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols", "group"), SHAPES)
def test_equals_the_reference_bitwise(rows, cols, group, dtype, generator):
    both(torch.randn(rows, cols, generator=generator).to(dtype), group)


def test_rows_far_apart_and_several_chunks(generator, monkeypatch):
    monkeypatch.setattr(chunks, "_WEIGHTS_AT_ONCE", 64 * 256)
    wide = torch.randn(320, 300, generator=generator).bfloat16()
    whole = both(wide[:, :256].contiguous(), 32)
    assert all(torch.equal(a, b) for a, b in zip(both(wide[:, :256], 32).buffers, whole.buffers, strict=True))


@pytest.fixture(scope="module")
def sglang_layout() -> ModuleType:
    """SGLang's own packing for its tests. It names a type of sgl_kernel, which is for GPUs, in annotations."""
    # First, as these decide by its absence what they can do.
    import sglang.srt.layers.quantization.marlin_utils

    assert sglang.srt.layers.quantization.marlin_utils.scalar_types
    missing = util.find_spec("sgl_kernel") is None
    if missing:
        kernel, types = ModuleType("sgl_kernel"), ModuleType("sgl_kernel.scalar_type")
        types.ScalarType = type("ScalarType", (), {})  # type: ignore[attr-defined]
        sys.modules |= {"sgl_kernel": kernel, "sgl_kernel.scalar_type": types}
    try:
        from sglang.test import test_marlin_utils
    finally:
        if missing:
            del sys.modules["sgl_kernel"], sys.modules["sgl_kernel.scalar_type"]
    return test_marlin_utils


@pytest.mark.parametrize(("rows", "cols", "group"), SHAPES)
def test_the_layout_is_what_sglang_packs(rows, cols, group, generator, sglang_layout):
    levels, scales, zeros = random_levels(rows, cols, group, generator)
    out = MarlinWeight.empty(rows, cols, group)
    reference.pack(levels, scales, zeros, out)
    perm = sglang_layout.get_weight_perm(4)
    assert torch.equal(out.packed, sglang_layout.marlin_weights(levels.t().int(), cols, rows, 4, perm))
    placed = sglang_layout.marlin_permute_scales(scales.t().contiguous(), cols, rows, group)
    assert torch.equal(out.placed_scales, placed)
    placed = sglang_layout.marlin_zero_points(zeros.t().int(), cols // group, rows, 4)
    assert torch.equal(out.placed_zeros, placed)


def by_thread(weight: MarlinWeight) -> torch.Tensor:
    """Levels as the threads of SGLang's repacking kernel write them, word by word (gptq_marlin_repack.cuh)."""
    levels = torch.full(weight.shape, 255, dtype=torch.uint8)
    words = [[word & 0xFFFFFFFF for word in row] for row in weight.packed.tolist()]
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for k_tile in range(weight.in_features // 16):
        for n_tile in range(weight.out_features // 64):
            for warp in range(4):
                for thread in range(32):
                    word = words[k_tile][n_tile * 128 + thread * 4 + warp]
                    column, row = n_tile * 64 + warp * 16 + thread // 4, k_tile * 16 + thread % 4 * 2
                    for place, value in enumerate(order):
                        n, k = column + value // 4 * 8, row + (0, 1, 8, 9)[value % 4]
                        levels[n, k] = word >> 4 * place & 15
    return levels


def test_the_layout_is_that_of_the_kernels_threads(generator):
    levels, scales, zeros = random_levels(192, 256, 64, generator)
    out = MarlinWeight.empty(192, 256, 64)
    reference.pack(levels, scales, zeros, out)
    assert torch.equal(by_thread(out), levels)
    found = reference.unpack(out)
    assert all(torch.equal(a, b) for a, b in zip(found, (levels, scales, zeros), strict=True))


def test_levels_of_a_weight_that_has_them(generator):
    """A weight that lies on its levels is stored as those and comes back to the bit."""
    levels, scales, zeros = random_levels(128, 256, 32, generator)
    levels[:, ::32], levels[:, 1::32] = 0, 15
    weight = weight_of(levels, scales, zeros)
    packed = both(weight, 32)
    assert all(torch.equal(a, b) for a, b in zip(reference.unpack(packed), (levels, scales, zeros), strict=True))
    assert torch.equal(dequantize(packed, implementation="reference"), weight.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_a_rounding(dtype, generator):
    """Half a level, what the zero point's own rounding cuts off an end, and rounding the scale and the product."""
    weight = torch.randn(256, 512, generator=generator).mul_(0.02).add_(0.01).to(dtype)
    weight[0], weight[1], weight[2] = 0, 0.5, -3
    weight[3, ::2] = 1e4
    packed = both(weight, 64)
    scales = reference.unpack(packed)[1].double().repeat_interleave(64, dim=1)
    error = (dequantize(packed, implementation="reference").double() - weight.double()).abs()
    assert (error <= 0.57 * scales + 2**-9 * weight.double().abs()).all()
    assert (error[0] == 0).all()
    whole = torch.randn(512, 1024, generator=generator).bfloat16()
    found = dequantize(quantize_pack(whole, 128, implementation=MARLIN), implementation="reference")
    assert 0.09 < (found - whole.float()).norm() / whole.float().norm() < 0.105  # ours: .100


def test_weights_that_are_not_finite_crash_nothing():
    weight = torch.randn(64, 128).bfloat16()
    weight[3, 5], weight[4, 6], weight[5, 7] = float("nan"), float("inf"), float("-inf")
    packed = both(weight, 32)
    others = dequantize(packed, implementation="reference")[10:]
    assert (others - weight[10:].float()).norm() < 0.1 * weight[10:].float().norm()


def test_requantizing_keeps_the_addresses(generator):
    first, second = (torch.randn(64, 256, generator=generator).bfloat16() for _ in range(2))
    packed = quantize_pack(first, 32, implementation=MARLIN)
    addresses = [buffer.data_ptr() for buffer in packed.buffers]
    before = dequantize(packed, implementation="reference")
    assert quantize_pack(second, 32, out=packed, implementation=MARLIN) is packed
    assert [buffer.data_ptr() for buffer in packed.buffers] == addresses
    fresh = quantize_pack(second, 32, implementation=MARLIN)
    assert torch.equal(packed.packed, fresh.packed) and not torch.equal(
        dequantize(packed, implementation="reference"), before
    )


def test_size_and_bits():
    packed = MarlinWeight.empty(3584, 18944, 128)
    assert packed.nbytes == 3584 * 18944 // 2 + 3584 * 148 * 2 + 3584 * 148 // 2
    assert packed.bits_per_weight == 4 + 20 / 128 and packed.shape == (3584, 18944)


@pytest.mark.parametrize(
    ("rows", "cols", "group", "dtype", "reason"),
    [
        (80, 384, 128, torch.bfloat16, "N is no multiple of 64"),
        (64, 320, 64, torch.bfloat16, "K none of 128"),
        (64, 512, 256, torch.bfloat16, "groups of 256"),
        (64, 128, 128, torch.bfloat16, "one group a row"),
        (64, 256, 128, torch.float64, "float64"),
    ],
)
def test_shapes_that_it_refuses(rows, cols, group, dtype, reason):
    assert reason in (MarlinWeight.refusal(rows, cols, group, dtype) or "")
    with pytest.raises(ValueError, match=reason):
        MarlinWeight.empty(rows, cols, group, dtype)
    if dtype != torch.float64:
        with pytest.raises(TypeError, match=f"marlin does not serve .*{reason}"):
            quantize_pack(torch.zeros(rows, cols, dtype=dtype), group, implementation=MARLIN)


@pytest.mark.parametrize("implementation", [MARLIN, "reference", None])
def test_it_has_no_clip_search(implementation):
    """Rather than a range that nobody searched."""
    out = MarlinWeight.empty(64, 256, 128)
    with pytest.raises(ValueError, match="clip_search is for our own layout, not for a MarlinWeight"):
        quantize_pack(torch.ones(64, 256), 128, clip_search=True, out=out, implementation=implementation)
    assert not chunks.serves(torch.ones(64, 256), True, out) and chunks.serves(torch.ones(64, 256), False, out)


def test_rows_are_a_view_of_whole_tiles(generator):
    packed = quantize_pack(torch.randn(256, 128, generator=generator).bfloat16(), 32, implementation=MARLIN)
    whole = dequantize(packed, implementation="reference")
    part = packed.rows(64, 128)
    assert part.shape == (128, 128) and part.packed.data_ptr() == packed.packed.data_ptr() + 64 * 2 * 4
    assert torch.equal(dequantize(part, implementation="reference"), whole[64:192])
    with pytest.raises(ValueError, match="not whole tiles of 64"):
        packed.rows(16, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_on_a_cpu_is_the_references(dtype, generator):
    packed = quantize_pack(torch.randn(192, 384, generator=generator).bfloat16(), 128, implementation=MARLIN)
    x, bias = torch.randn(5, 384, generator=generator).to(dtype), torch.randn(192, generator=generator).to(dtype)
    truth = x.double() @ dequantize(packed, implementation="reference").double().T + bias.double()
    found = w4a16_linear(x, packed, bias, implementation="reference")
    assert (found.double() - truth).norm() < (4e-3 if dtype == torch.bfloat16 else 1e-6) * truth.norm()


@pytest.mark.parametrize("op", ["w4a16_linear", "w4a8_linear"])
def test_compiled_cpu_kernels_refuse_it(op, generator):
    """They would read other buffers."""
    packed = quantize_pack(torch.randn(64, 128, generator=generator).bfloat16(), 32, implementation=MARLIN)
    with pytest.raises(TypeError, match="served by none of cpu"):
        getattr(kernels, op)(torch.randn(2, 128), packed, implementation="cpu")
    with pytest.raises(TypeError, match="served by none of cpu"):
        dequantize(packed, implementation="cpu")


@pytest.fixture
def named(monkeypatch):
    """named(names): as `--er-kernels names`, for this test."""

    def name(names: str) -> None:
        monkeypatch.setenv(registry.ENVIRONMENT, names)
        registry.candidates.cache_clear()
        formats._say_refused.cache_clear()

    yield name
    monkeypatch.undo()
    registry.candidates.cache_clear()


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ("auto", PackedWeight),
        ("cpu", PackedWeight),
        ("cpu,marlin,reference", PackedWeight),
        ("marlin,reference", MarlinWeight),
        ("marlin,cpu,reference", MarlinWeight),
    ],
)
def test_the_first_that_is_named_decides_on_the_layout(names, layout, named):
    named(names)
    assert type(quantize_pack(torch.randn(64, 256).bfloat16(), 128)) is layout


def test_other_shapes_keep_our_layout_and_it_is_said_once(named, caplog):
    named("marlin,cpu,reference")
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert type(quantize_pack(torch.randn(80, 256).bfloat16(), 128)) is PackedWeight
    assert caplog.text.count("[80, 256] keep our own layout") == 1


def test_a_cpu_needs_plain_torch_beside_it(named):
    named("marlin,cpu")
    with pytest.raises(ValueError, match=r"no kernel for CPUs.*name reference too"):
        quantize_pack(torch.randn(64, 256).bfloat16(), 128)


def test_a_gpu_where_the_kernel_fails_its_self_test_keeps_our_layout(named, monkeypatch):
    """The device is named only: nothing is computed on it."""
    named("marlin,reference")
    wrong = binding.w4a16_linear
    monkeypatch.setattr(registry.self_test, "problem", lambda _, function, *__: "wrong" if function is wrong else None)
    assert not formats._multiplied("cuda", torch.bfloat16)
    monkeypatch.setattr(registry.self_test, "problem", lambda *_: None)
    registry.candidates.cache_clear()
    assert formats._multiplied("cuda", torch.bfloat16)
    assert not formats._multiplied("cuda", torch.float32)


def test_the_binding_refuses_what_the_kernel_cannot_read(generator):
    packed = quantize_pack(torch.randn(64, 256, generator=generator).bfloat16(), 128, implementation=MARLIN)
    x = torch.randn(2, 256).bfloat16()
    for values in (x, x.half(), x.float()):
        assert not binding.serves(values, packed, None, values.new_empty(2, 64))
    with pytest.raises(TypeError, match="Marlin does not serve"):
        binding.w4a16_linear(x, packed, None, x.new_empty(2, 64))


def test_the_number_of_the_type_is_sglangs(tmp_path):
    """The compiler says so, of the header that the kernel is compiled with."""
    root = util.find_spec("sglang").submodule_search_locations[0]
    header = Path(root) / "kernels/jit/include/sgl_kernel/scalar_type.hpp"
    source = tmp_path / "type.cpp"
    source.write_text(
        f'#include <cstdint>\n#include <string>\n#include <tuple>\n#include <utility>\n#include "{header}"\n'
        f"static_assert(sglang::host::kU4.id() == {binding.UINT4}LL);\n"
    )
    subprocess.run(["g++", "-std=c++20", "-fsyntax-only", str(source)], check=True, timeout=60)


def test_sglangs_module_is_where_it_is_looked_for():
    """The function that SGLang calls with the arguments that we pass, in that order."""
    import inspect

    import sglang.kernels.ops.gemm.gptq_marlin as source

    assert source.__name__ == loader.MODULES[0] and callable(getattr(source, loader._MAKER))
    call = inspect.getsource(source.gptq_marlin_gemm).split("module.gptq_marlin_gemm(")[1].split(")")[0]
    assert [line.strip(" ,") for line in call.strip().splitlines()] == [
        *("a", "b_q_weight", "b_scales", "global_scale_t", "b_zeros_t", "g_idx_t", "perm_t", "c", "c_tmp", "a_tmp"),
        *("workspace", "b_q_type.id", "is_k_full", "use_atomic_add", "use_fp32_reduce", "is_zp_float"),
    ]
    assert source._MAX_THREAD_N == workspaces.MOST_BLOCK_COLS


def test_an_sglang_without_it_is_one_line(monkeypatch):
    monkeypatch.setattr(loader, "MODULES", ("sglang.no_such_module", "sglang.kernels"))
    loader.module.cache_clear()
    with pytest.raises(loader.MarlinError, match=r"use --er-kernels without marlin$"):
        loader.module(torch.bfloat16)
    loader.module.cache_clear()
