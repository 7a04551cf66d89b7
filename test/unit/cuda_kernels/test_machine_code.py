"""Every CUDA library compiles for Hopper, spills nothing, uses the registers on record and the instructions it claims.

The table is csrc/cuda/resources.json; `sglang-er build-kernels --arch 90a --resources csrc/cuda/resources.json` writes
it. The first run compiles (minutes in all), later ones find the libraries in the user's cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sglang_er.kernels.cuda import build, loader
from sglang_er.kernels.cuda.specs import ARCHS, SPECS, Spec, spec_of

HOPPER = ARCHS["90a"]
MORE_REGISTERS = 8
RECORDED = json.loads((build.sources() / "cuda" / "resources.json").read_text())[HOPPER.sm]

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc here")
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def disassembler() -> Path | None:
    """cuobjdump of the toolkit, else the one that Triton ships."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    triton = importlib.util.find_spec("triton")
    folders = [Path(nvcc).resolve().parent for nvcc in filter(None, [build.find_nvcc()])]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").is_file()), None)


def machine_code(library: Path) -> dict[str, str]:
    """Disassembly by kernel."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump here")
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    done = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True, env=environment)
    _, *parts = re.split(r"^\s*Function : (\S+)$", done.stdout, flags=re.MULTILINE)
    return dict(zip(build.readable(parts[0::2]), parts[1::2]))


@each_spec
def test_a_library_uses_the_registers_on_record_and_spills_nothing(spec: Spec):
    kernels = build.record(build.build(spec, HOPPER))["kernels"]
    recorded = RECORDED[spec.name]
    assert set(kernels) == set(recorded)
    for name, used in kernels.items():
        assert used["spills"] == 0, name
        assert used["stack"] == 0, name
        assert used["registers"] <= recorded[name]["registers"] + MORE_REGISTERS, name
        assert used["shared"] <= recorded[name]["shared"], name


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.claims], ids=lambda spec: spec.name)
def test_kernels_have_the_instructions_that_they_claim(spec: Spec):
    code = machine_code(build.build(spec, HOPPER))
    assert code
    for part, patterns in spec.claims:
        named = [name for name in code if part in name]
        assert named, part
        for name in named:
            for pattern in patterns:
                assert re.search(pattern, code[name]), f"{name} has no {pattern}"
            assert not re.search(r"\b(LDL|STL)\b", code[name]), f"{name} uses local memory"


@each_spec
def test_a_library_loads_without_a_gpu_and_exports_its_functions(spec: Spec):
    module = loader.load(spec.name, HOPPER)
    assert all(callable(getattr(module, function)) for function in spec.functions)


@pytest.mark.parametrize("name", [spec.name for spec in SPECS if spec.name.startswith("w4a")])
def test_sums_of_splits_take_what_the_call_needs(name: str):
    """None where K is not cut; by 8, 16, 32 or 64 rows of x, more rows by chunks of 64."""
    values = loader.load(name, HOPPER).partial_values
    assert values(152064, 3584, 64) == values(4096, 128, 8) == values(0, 4096, 8) == values(4096, 4096, 0) == 0
    split = values(1536, 8960, 1)
    assert split > 0 and split % (12 * 128 * 8) == 0  # 12 tiles of 128 outputs
    by_rows = [values(1536, 8960, rows) // split for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 256)]
    assert by_rows == [1, 1, 2, 2, 4, 4, 8, 8, 16, 32]


@pytest.mark.parametrize(
    ("name", "arch"), [(spec.name, arch) for spec in SPECS for arch in spec.archs if arch != HOPPER.name]
)
def test_a_library_compiles_for_its_other_targets(name: str, arch: str):
    kernels = build.record(build.build(spec_of(name), ARCHS[arch]))["kernels"]
    assert set(kernels) == set(RECORDED[name])
