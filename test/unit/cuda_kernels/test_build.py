"""The cache of CUDA libraries: built once, by hash, by one process; and what is said where it cannot be built."""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_er.cli import build_kernels
from sglang_er.kernels.cpu.loader import LibraryError
from sglang_er.kernels.cuda import build
from sglang_er.kernels.cuda.specs import ARCHS, SPECS, spec_of

SPEC, HOPPER = spec_of("quantize_pack"), ARCHS["90a"]


def command(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    build_kernels.add_arguments(parser)
    return build_kernels.run(parser.parse_args(argv))


@pytest.fixture
def own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = Path(shutil.copytree(build.sources(), tmp_path / "csrc"))
    monkeypatch.setattr(build, "sources", lambda: copied)
    return copied


def test_a_library_is_compiled_once_and_recorded(compiler):
    library = build.build(SPEC, HOPPER)
    assert build.build(SPEC, HOPPER) == library
    assert compiler.runs == 1
    record = json.loads(library.with_suffix(".json").read_text())
    assert record["spec"] == "quantize_pack" and record["arch"] == "sm_90a"
    assert record["kernels"] == {"plain": {"registers": 40, "spills": 16, "stack": 8, "shared": 1024}}


def test_processes_that_need_the_same_library_wait_for_one(compiler):
    with ThreadPoolExecutor(4) as pool:
        libraries = set(pool.map(lambda _: build.build(SPEC, HOPPER), range(4)))
    assert len(libraries) == 1
    assert compiler.runs == 1


@pytest.mark.parametrize("file", ["cuda/quantize_pack.cu", "cuda/binding.h", "include/sglang_er/quantize.h"])
def test_what_a_source_includes_decides_the_library(own_sources: Path, file: str):
    before = build.source_key(SPEC, HOPPER)
    with (own_sources / file).open("a") as text:
        text.write("\n")
    assert build.source_key(SPEC, HOPPER) != before


def test_a_file_that_is_not_included_does_not(own_sources: Path):
    before = build.source_key(SPEC, HOPPER)
    with (own_sources / "cuda" / "w4a16_linear.cu").open("a") as text:
        text.write("\n")
    assert build.source_key(SPEC, HOPPER) == before


def test_target_defines_and_compiler_decide_the_library(compiler):
    assert build.source_key(SPEC, HOPPER) != build.source_key(SPEC, ARCHS["80"])
    assert len({build.source_key(spec_of(f"w4a16_linear_{kind}"), HOPPER) for kind in ("bf16", "fp16")}) == 2
    first = build.build(SPEC, HOPPER)
    compiler.write(version="2.0")
    assert build.build(SPEC, HOPPER) != first


def test_a_failed_build_is_one_line_and_leaves_nothing(compiler):
    compiler.write(body='echo "x.cu(3): error: no such thing"; exit 1')
    with pytest.raises(LibraryError) as raised:
        build.build(SPEC, HOPPER)
    text = str(raised.value)
    assert "quantize_pack.cu does not compile for sm_90a: x.cu(3): error: no such thing" in text
    assert "\n" not in text
    assert not list(build.cache_dir().rglob("*.so"))
    compiler.write()
    assert build.build(SPEC, HOPPER).is_file()


def test_a_missing_compiler_is_one_line(compiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(LibraryError, match="no nvcc found") as raised:
        build.build(SPEC, HOPPER)
    assert "\n" not in str(raised.value)


def test_the_named_toolkit_is_used(compiler):
    assert build.find_nvcc() == str(compiler.folder / "bin" / "nvcc")


def test_shipped_libraries_serve_without_a_compiler(compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    folder = tmp_path / "shipped"
    assert command("--arch", "90a,80", "--out", str(folder)) == 0
    assert capsys.readouterr().out.count(" kernels, ") == sum(("80" in spec.archs) + 1 for spec in SPECS)
    monkeypatch.setenv(build.PREBUILT_ENVIRONMENT, str(folder))
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.find(SPEC, HOPPER) == folder / "quantize_pack.sm_90a.so"
    with pytest.raises(LibraryError, match=r"has no quantize_pack\.sm_100\.so"):
        build.find(SPEC, ARCHS["100"])


def test_shipped_libraries_of_other_sources_are_refused(
    compiler, own_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "shipped"
    assert command("--arch", "90a", "--out", str(folder)) == 0
    monkeypatch.setenv(build.PREBUILT_ENVIRONMENT, str(folder))
    assert build.find(SPEC, HOPPER).is_file()
    with (own_sources / "cuda" / "quantize_pack.cu").open("a") as text:
        text.write("\n")
    with pytest.raises(LibraryError, match="another version"):
        build.find(SPEC, HOPPER)


def test_the_command_says_in_one_line_why_it_failed(compiler, capsys):
    compiler.write(body='echo "fatal: disk full"; exit 1')
    assert command("--arch", "90a") == 1
    error = capsys.readouterr().err
    assert error.startswith("sglang-er build-kernels: CUDA kernels: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        command("--arch", "75")


def test_resources_are_written_a_kernel_a_line(compiler, tmp_path: Path):
    table = tmp_path / "resources.json"
    assert command("--arch", "90a", "--resources", str(table)) == 0
    assert json.loads(table.read_text())["sm_90a"]["quantize_pack"]["plain"]["registers"] == 40
    assert sum("registers" in line for line in table.read_text().splitlines()) == len(SPECS)


def test_names_of_anonymous_namespaces_have_no_hashes():
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt here")
    names = [
        f"_ZN9sglang_er4cuda{len(space)}{space}6kernelIfLi64EEEvNS1_6ParamsE"
        for space in ("_GLOBAL__N__89bc6d08_4_x_cu_f026cd4a", "_GLOBAL__N__12bc6d08_4_x_cu_a026cd4a_6712")
    ]
    assert build.readable(names) == ["kernel<float, 64>"] * 2


def test_libraries_of_the_wheel_need_no_compiler(
    compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_sources
):
    """Until the sources say otherwise."""
    shipped = tmp_path / "prebuilt"
    assert command("--arch", "90a", "--out", str(shipped)) == 0
    monkeypatch.setattr(build, "shipped_dir", lambda: shipped)
    before = compiler.runs
    assert build.find(SPEC, HOPPER) == shipped / build.file_name(SPEC, HOPPER)
    with (own_sources / "cuda" / SPEC.source).open("a") as text:
        text.write("\n")
    assert build.find(SPEC, HOPPER).parent != shipped
    assert compiler.runs == before + 1
