"""The kernel cases find what is wrong: a result that is a little off, written beside, or not written at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from gpu import bench_kernels, kernels
from gpu.kernel_cases import cases
from gpu.sections import Context, Options, Skip

from sglang_er.kernels import registry

CONTEXT = Context(Options(Path(), dry_run=True))
NAME = "spoilt"
LINEAR = ("w4a16_linear", "w4a8_linear", "bf16_linear")


@pytest.fixture
def spoilt() -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """Registers the reference of an op with something done to it."""
    registered = []

    def register(op: str, spoil: Callable[..., Any]) -> None:
        reference = next(entry for entry in registry.implementations(op) if entry.name == registry.REFERENCE)

        def function(*arguments: Any) -> None:
            spoil(reference.function, *arguments)

        entry = replace(reference, name=NAME, device="cpu", function=function, proven=False)
        registry.register(op, entry)
        registered.append((op, entry))

    yield register
    for op, entry in registered:
        registry._implementations[op].remove(entry)
    registry.candidates.cache_clear()


def test_every_op_has_cases():
    for op in registry.ops():
        assert len(cases(op, small=True)) >= 2 and len(cases(op, small=False)) >= 2


@pytest.mark.parametrize("op", registry.ops())
def test_an_implementation_that_writes_nothing_fails(op: str, spoilt):
    spoilt(op, lambda reference, *arguments: None)
    assert not kernels.check(op, NAME, CONTEXT)["passed"]


@pytest.mark.parametrize("op", registry.ops())
def test_the_reference_itself_passes(op: str, spoilt):
    spoilt(op, lambda reference, *arguments: reference(*arguments))
    found = kernels.check(op, NAME, CONTEXT)
    assert found["passed"], found


@pytest.mark.parametrize("op", [*LINEAR, "w4a16_experts", "softmax_rows", "paged_attention"])
def test_one_wrong_element_fails(op: str, spoilt):
    def spoil(reference: Callable[..., None], *arguments: Any) -> None:
        reference(*arguments)
        out = arguments[-1]
        out.view(-1)[-1:].mul_(3) if out.is_contiguous() else out[-1, -1:].mul_(3)

    spoilt(op, spoil)
    assert not kernels.check(op, NAME, CONTEXT)["passed"]


def test_a_drawn_index_beside_the_right_one_fails(spoilt):
    def spoil(reference: Callable[..., None], weights: torch.Tensor, *rest: Any) -> None:
        reference(weights, *rest)
        rest[-1][1] = (rest[-1][1] + 1) % weights.shape[-1]

    spoilt("sample_rows", spoil)
    assert not kernels.check("sample_rows", NAME, CONTEXT)["passed"]


@pytest.mark.parametrize("spoilt_output", ["tokens", "accept_lens"])
def test_a_chain_with_one_wrong_number_fails(spoilt_output: str, spoilt):
    def spoil(reference: Callable[..., None], *arguments: Any) -> None:
        reference(*arguments)
        tokens, lens = arguments[-2:]
        if spoilt_output == "tokens":
            tokens[1, lens[1] - 1] = (tokens[1, lens[1] - 1] + 1) % arguments[0].shape[-1]
        else:
            lens[1] += 1

    spoilt("verify_chain", spoil)
    assert not kernels.check("verify_chain", NAME, CONTEXT)["passed"]


def test_what_is_written_beside_the_output_is_found(spoilt):
    def spoil(reference: Callable[..., None], x: torch.Tensor, weight: Any, bias: Any, out: torch.Tensor) -> None:
        reference(x, weight, bias, out)
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.shape[1]).fill_(0)

    spoilt("w4a16_linear", spoil)
    assert not kernels.check("w4a16_linear", NAME, CONTEXT)["passed"]


def test_arguments_that_an_implementation_does_not_take_are_no_failure(spoilt):
    spoilt("softmax_rows", lambda reference, *arguments: reference(*arguments))
    entry = registry._implementations["softmax_rows"][-1]
    narrow = replace(entry, serves=lambda logits, *rest: logits.dtype == torch.bfloat16)
    registry._implementations["softmax_rows"][-1] = narrow
    registry.candidates.cache_clear()
    try:
        found = kernels.check("softmax_rows", NAME, CONTEXT)
    finally:
        registry._implementations["softmax_rows"][-1] = entry
    served = [label for label, result in found["cases"].items() if "not_served" not in result]
    assert found["passed"] and served and all("bf16" in label for label in served)


def test_marlins_layout_has_cases_and_its_packing_passes():
    for op in ("quantize_pack", "w4a16_linear"):
        for small in (True, False):
            assert any(case.label.startswith("marlin ") for case in cases(op, small))
    found = kernels.check("quantize_pack", "marlin", CONTEXT)
    served = [label for label, result in found["cases"].items() if "not_served" not in result]
    assert found["passed"] and served and all(label.startswith("marlin ") for label in served)


def test_the_layers_of_three_models_are_measured_with_every_library():
    cells = [*bench_kernels.cells(Options(Path())), *bench_kernels.more_cells(Options(Path()))]
    found = {cell.name for cell in cells}
    for layer in ("qkv 4608x3584", "Llama-3.1-8B down 4096x14336", "Qwen3-4B lm_head 151936x2560"):
        for implementation in ("cuda", "marlin", "humming"):
            assert f"w4a16_linear {implementation} {layer}" in found
        assert f"bf16_linear torch {layer}" in found
    assert len(found) == len(cells)


def test_a_library_that_cannot_be_had_is_a_skipped_cell():
    cell = next(c for c in bench_kernels.cells(CONTEXT.options) if c.name.startswith("w4a16_linear humming"))
    with pytest.raises(Skip, match="GPUs only"):
        cell.run(CONTEXT)
