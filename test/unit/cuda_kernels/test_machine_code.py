"""Every CUDA library compiles for Hopper, spills nothing, uses the registers on record and the instructions it claims.

The table is csrc/cuda/resources.json; `sglang-er build-kernels --arch 90a --resources csrc/cuda/resources.json` writes
it. The first run compiles (minutes in all), later ones find the libraries in the user's cache.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from machine_code import disassembler, machine_code, main_loop

from sglang_er.kernels.cuda import build, loader
from sglang_er.kernels.cuda.specs import ARCHS, SPECS, Spec, spec_of

HOPPER = ARCHS["90a"]
MORE_REGISTERS = 8
RECORDED = json.loads((build.sources() / "cuda" / "resources.json").read_text())[HOPPER.sm]

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc here")
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def disassembled(library: Path) -> dict[str, str]:
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump here")
    return machine_code(library, tool)


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
    code = disassembled(build.build(spec, HOPPER))
    assert code
    for part, patterns in spec.claims:
        named = [name for name in code if part in name]
        assert named, part
        for name in named:
            for pattern in patterns:
                assert re.search(pattern, code[name]), f"{name} has no {pattern}"
            assert not re.search(r"\b(LDL|STL)\b", code[name]), f"{name} uses local memory"


@pytest.mark.parametrize(("name", "most"), [("w4a16_linear_bf16", 360), ("w4a8_linear_bf16", 200)])
def test_a_step_of_few_rows_has_few_instructions(name: str, most: int):
    """A multiprocessor has some 940 cycles for the weights of a step, and eight warps: docs/gpu.md#kernels."""
    code = disassembled(build.build(spec_of(name), HOPPER))
    kernel = next(kernel for kernel in code if re.search(r"_linear_kernel<(false|\(bool\)0), 1>", kernel))
    assert 100 < len(main_loop(code[kernel])) <= most


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
