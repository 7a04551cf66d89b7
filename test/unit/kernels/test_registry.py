"""Who computes an op: explicit choice, no silent fallback, one clear line when something is missing."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_er import kernels
from sglang_er.kernels import MarlinWeight, PackedWeight, QuantizedWeight, dispatch_table, registry
from sglang_er.kernels.cpu import loader

VERSION_HEADER = Path(__file__).parents[3] / "csrc/include/sglang_er/version.h"


@pytest.fixture
def fresh_loader(monkeypatch):
    """Loader and registry as in a new process, and again after the test."""
    loader.library.cache_clear()
    registry.candidates.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    loader.library.cache_clear()
    registry.candidates.cache_clear()


def test_compiled_kernels_are_active_on_cpu():
    for op in ("quantize_pack", "w4a16_linear", "dequantize"):
        assert kernels.active_implementation(op, "cpu", torch.bfloat16) == "cpu"


def test_reference_by_environment(fresh_loader):
    fresh_loader.setenv("SGLANG_ER_KERNELS", "reference")
    assert kernels.active_implementation("w4a16_linear", "cpu", torch.bfloat16) == "reference"


def test_unknown_implementation_names_the_known_ones(fresh_loader):
    fresh_loader.setenv("SGLANG_ER_KERNELS", "fast")
    with pytest.raises(ValueError, match="no implementation 'fast', choose one of auto, reference, cpu, cuda, triton"):
        kernels.quantize_pack(torch.ones(16, 128))


def test_unsupported_dtype_does_not_fall_back():
    with pytest.raises(TypeError, match="cpu does not serve"):
        registry.resolve("w4a16_linear", "cpu", torch.float64)


def test_device_without_kernels_uses_the_reference_and_says_so(caplog, fresh_loader):
    with caplog.at_level("WARNING"):
        assert kernels.active_implementation("w4a16_linear", "cuda", torch.bfloat16) == "reference"
    assert "using plain torch" in caplog.text


def test_unknown_op():
    with pytest.raises(KeyError, match="known ops"):
        registry.resolve("w2a2_linear", "cpu", torch.bfloat16)


def test_missing_library(fresh_loader, tmp_path):
    fresh_loader.setattr(loader, "LIBRARY_PATH", tmp_path / "libsglang_er_cpu.so")
    with pytest.raises(kernels.LibraryError, match=r"^libsglang_er_cpu.so is not built: run 'make setup'$"):
        kernels.quantize_pack(torch.ones(16, 128))
    kernels.quantize_pack(torch.ones(16, 128), implementation="reference")  # asked for: works


def test_broken_library(fresh_loader, tmp_path):
    broken = tmp_path / "libsglang_er_cpu.so"
    broken.write_bytes(b"not a library")
    fresh_loader.setattr(loader, "LIBRARY_PATH", broken)
    with pytest.raises(kernels.LibraryError, match="run 'make setup'") as error:
        kernels.isa()
    assert "\n" not in str(error.value)


def test_library_of_another_version(fresh_loader):
    fresh_loader.setattr(loader, "LIBRARY_VERSION", 999)
    with pytest.raises(kernels.LibraryError, match="this package needs 999: run 'make setup'"):
        kernels.isa()


def test_version_agrees_with_the_header():
    assert f"kLibraryVersion = {loader.LIBRARY_VERSION};" in VERSION_HEADER.read_text()
    assert kernels.library_version() == loader.LIBRARY_VERSION


def test_isa_by_environment(fresh_loader):
    for name in kernels.supported_isas():
        loader.library.cache_clear()
        fresh_loader.setenv("SGLANG_ER_CPU_ISA", name)
        assert kernels.isa() == name
    kernels.set_isa("auto")
    assert kernels.isa() == kernels.supported_isas()[0]


def test_unknown_isa_names_the_available_ones():
    with pytest.raises(ValueError, match=r"'sse9' is not available here; choose one of auto, .*portable"):
        kernels.set_isa("sse9")


def test_one_openmp_runtime():
    """A second OpenMP runtime would mean a second team of threads spinning on the same cores."""
    code = """
import torch
from sglang_er import kernels
count = lambda: len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line})
torch.randn(512, 512) @ torch.randn(512, 512)
before = count()
kernels.quantize_pack(torch.randn(4096, 512))
assert before == count() == 1, (before, count())
threads = [line for line in open("/proc/self/status") if line.startswith("Threads")]
print(threads)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def make(name: str, **options) -> registry.Implementation:
    return registry.Implementation(name, "cuda", frozenset({torch.float32}), lambda *_: None, **options)


@pytest.fixture
def several(monkeypatch):
    """An op with implementations for a GPU beside the reference; what they would compute is not asked."""
    known = {"op": [make("first", proven=False), make("second", serves=lambda size: size < 8), make("third")]}
    known["op"].append(registry.Implementation("reference", None, frozenset({torch.float32}), lambda *_: None))
    monkeypatch.setattr(registry, "_implementations", known)
    registry.candidates.cache_clear()
    yield known["op"]
    registry.candidates.cache_clear()


def names(choice: str | None = None) -> list[str]:
    return [entry.name for entry in registry.candidates("op", "cuda", torch.float32, choice)]


def test_a_gpu_takes_what_was_seen_correct_and_the_reference_last(several):
    assert names() == ["second", "third", "reference"]


def test_what_is_named_is_asked_in_that_order(several):
    assert names("first") == ["first"] and names("third, first") == ["third", "first"]


def test_what_fails_its_self_test_is_not_asked_and_said_so(several, monkeypatch, caplog):
    broken = several[1].function
    monkeypatch.setattr(registry.self_test, "problem", lambda _, function, *__: "wrong" if function is broken else None)
    assert names() == ["third", "reference"] and "second is not used on this cuda: wrong" in caplog.text
    with pytest.raises(RuntimeError, match="second gives wrong results"):
        names("second")


def test_arguments_that_one_does_not_serve_go_to_the_next(several):
    asked = []
    for index, entry in enumerate(several):
        several[index] = dataclasses.replace(entry, function=lambda *_, name=entry.name: asked.append(name))
    registry.candidates.cache_clear()
    registry.run("op", "cuda", torch.float32, None, 4)
    registry.run("op", "cuda", torch.float32, None, 8)
    assert asked == ["second", "third"]
    with pytest.raises(TypeError, match="served by none of second"):
        registry.run("op", "cuda", torch.float32, "second", 8)


class Sized:
    """x of `w4a16_linear` as far as the registry looks at it."""

    def __init__(self, rows: int) -> None:
        self.shape = (rows, 4096)


@pytest.fixture
def linear(monkeypatch):
    """`w4a16_linear` with three implementations for a GPU, and who of them was called; no table yet."""
    asked: list[str] = []

    def entry(name: str, **options) -> registry.Implementation:
        dtypes = frozenset({torch.bfloat16, torch.float32})
        return registry.Implementation(name, "cuda", dtypes, lambda *_: asked.append(name), **options)

    known = [entry("cuda", serves=lambda x, *_: x.shape[0] < 64), entry("triton"), entry("unproven", proven=False)]
    known.append(dataclasses.replace(entry("reference"), device=None))
    monkeypatch.setattr(registry, "_implementations", {"w4a16_linear": known, "other": list(known)})
    monkeypatch.setattr(registry, "_table", None)
    monkeypatch.setattr(registry.self_test, "problem", lambda *_: None)
    registry.candidates.cache_clear(), registry._choices.cache_clear()
    yield asked
    monkeypatch.undo()
    registry.candidates.cache_clear(), registry._choices.cache_clear()


def timed(**by_rows: dict[str, float]) -> dispatch_table.DispatchTable:
    """`rows_N={implementation: us}`"""
    cells = {(int(rows.split("_")[1]), 4096, 4096): times for rows, times in by_rows.items()}
    ops = {"w4a16_linear": {"group 128": cells}}
    return dispatch_table.DispatchTable("GPU", "key", "bfloat16", "abc", "2026-12-01", ops)


TABLE = timed(
    rows_1={"cuda": 1.0, "triton": 2.0, "unproven": 0.5},
    rows_4={"cuda": 2.0, "triton": 1.0},
    rows_64={"cuda": 1.0, "triton": 2.0},
)


BF16 = frozenset({torch.bfloat16})
OURS = PackedWeight.empty(4096, 4096, 128, device="meta")


def linear_call(
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    names: str | None = None,
    device: str = "cuda",
    weight: QuantizedWeight = OURS,
) -> None:
    registry.run("w4a16_linear", device, dtype, names, Sized(rows), weight, None, None)


def test_a_table_picks_the_fastest_for_the_size(linear):
    registry.use_table(TABLE)
    for rows in (1, 4, 3, 20, 1):
        linear_call(rows)
    assert linear == ["cuda", "triton", "triton", "cuda", "cuda"]  # 20 rows are not in it


def test_the_fastest_that_does_not_serve_is_followed_by_the_next(linear):
    registry.use_table(TABLE)
    linear_call(64)
    assert linear == ["triton"]


def test_the_table_is_about_gpus_its_dtype_its_ops_and_calls_that_name_nobody(linear):
    registry.use_table(TABLE)
    linear_call(4, dtype=torch.float32)
    linear_call(4, names="cuda")
    linear_call(4, names="cuda,triton")
    registry.run("other", "cuda", torch.bfloat16, None, Sized(4), Sized(4), None, None)
    assert linear == ["cuda"] * 4
    linear_call(4, device="cpu")
    assert linear[4:] == ["reference"]


def test_what_the_environment_names_is_chosen_from(linear, monkeypatch):
    monkeypatch.setenv("SGLANG_ER_KERNELS", "unproven,triton,cuda")
    registry.use_table(TABLE)
    for rows in (1, 4):
        linear_call(rows)
    assert linear == ["unproven", "triton"]


def test_a_weight_in_marlins_layout_keeps_the_order(linear, monkeypatch):
    """And one in ours never gets Marlin, whatever times somebody gave it."""
    marlins = MarlinWeight.empty(4096, 4096, 128, device="meta")

    def serves(x: Sized, weight: QuantizedWeight, *rest: object) -> bool:
        return isinstance(weight, MarlinWeight)

    registry.register_marlin("w4a16_linear", "cuda", BF16, lambda *_: linear.append("marlin"), serves)
    monkeypatch.setenv("SGLANG_ER_KERNELS", "marlin,cuda,triton")
    registry.use_table(timed(rows_4={"marlin": 0.1, "triton": 1.0, "cuda": 2.0}))
    for weight in (OURS, marlins, OURS):
        linear_call(4, weight=weight)
    assert linear == ["triton", "marlin", "triton"]
    monkeypatch.setenv("SGLANG_ER_KERNELS", "cuda,triton,marlin")
    registry.candidates.cache_clear(), registry._choices.cache_clear()
    linear_call(4, weight=marlins)
    assert linear[3:] == ["cuda"]  # in this test all others take any weight: the order is kept


def test_a_choice_is_found_once(linear, monkeypatch):
    searched = []
    fastest = dispatch_table.DispatchTable.fastest
    monkeypatch.setattr(
        dispatch_table.DispatchTable, "fastest", lambda self, *rest: searched.append(rest) or fastest(self, *rest)
    )
    registry.use_table(TABLE)
    for _ in range(3):
        linear_call(4)
    assert len(searched) == 1 and linear == ["triton"] * 3
    monkeypatch.setattr(registry, "MOST_CHOICES", 1)
    for _ in range(2):
        linear_call(1)
    assert len(searched) == 3 and linear[3:] == ["cuda"] * 2  # forgotten, found again, the same


def test_a_process_keeps_its_first_table(linear):
    """CUDA graphs hold what was chosen when they were recorded."""
    registry.use_table(TABLE)
    registry.use_table(dataclasses.replace(TABLE))  # an equal one
    with pytest.raises(RuntimeError, match="another kernel table is in use"):
        registry.use_table(dataclasses.replace(TABLE, commit="other"))
    assert registry.table_in_use() == TABLE


def test_who_computes_is_said_with_the_table(linear):
    assert registry.describe("w4a16_linear", "cuda", torch.bfloat16) == "cuda"
    registry.use_table(TABLE)
    shown = registry.describe("w4a16_linear", "cuda", torch.bfloat16)
    assert shown == "cuda (by table cuda at 2, triton at 1 sizes)"
    assert registry.describe("other", "cuda", torch.bfloat16) == "cuda"
    assert registry.describe("w4a16_linear", "cpu", torch.bfloat16) == "reference"


def test_plain_torch_is_no_kernel(several, monkeypatch, caplog):
    """Who would do without an op rather than wait is told so, and no log says that plain torch is used."""
    monkeypatch.setattr(registry.self_test, "problem", lambda *_: None)
    assert registry.has_kernel("op", "cuda", torch.float32)
    several[:] = [dataclasses.replace(entry, proven=False) for entry in several]
    for choice, served in ((None, False), ("first,reference", True), ("reference,first", False)):
        if choice is not None:
            monkeypatch.setenv("SGLANG_ER_KERNELS", choice)
        registry.candidates.cache_clear()
        assert registry.has_kernel("op", "cuda", torch.float32) == served
    assert not caplog.text


def test_every_triton_module_is_there():
    """They are imported at first use only."""
    for op in registry.ops():
        for entry in registry.implementations(op):
            if entry.name == "triton":
                module = importlib.import_module(f"sglang_er.kernels.triton.{op}")
                assert callable(getattr(module, op)) and module.SPECS
