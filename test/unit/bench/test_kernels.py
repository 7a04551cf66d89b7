"""`bench kernels` in miniature: every part runs, ops that a build lacks are left out, figures mean what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sglang_er import kernels
from sglang_er.bench import attention, kernels_report, linear
from sglang_er.bench import kernels as bench
from sglang_er.bench.kernels import Plan, Results
from sglang_er.bench.linear import Cell, Layer
from sglang_er.bench.stream import Bandwidth, Stream
from sglang_er.bench.timing import Timing
from sglang_er.models.tiny import TINY, Shape

QUICK = Timing(repeats=1, calls=1)
ABOUT: dict[str, Any] = {
    "command": "sglang-er bench kernels", "version": "1", "commit": None, "date": "today",
    "machine": {"cpu": "a CPU", "cores": 2, "load_before": [0.1, 0.2, 0.3]}, "threads": 1, "isas": ["avx2"],
}  # fmt: skip


def plan(**changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "models": {"tiny": TINY}, "layers": [], "batches": [1, 8], "contexts": [256], "queries": [1, 3],
        "isas": [kernels.isa()], "parts": bench.PARTS, "timing": QUICK, "footprint": 1 << 20, "kv_footprint": 1 << 18,
    }  # fmt: skip
    return Plan(**usual | changes)


@pytest.fixture(scope="module")
def results() -> Results:
    return bench.measure(plan(), lambda line: None)


def test_the_layers_of_a_model_hold_all_its_matrices():
    shape = Shape(1024, 28, 16, 8, 128, 3072, 151936)
    weights = sum(layer.rows * layer.cols * layer.count for layer in bench.layers_of(shape))
    assert weights == shape.parameters() - shape.vocab * shape.hidden  # the embedding is no linear layer


def test_every_part_is_measured_and_told(results):
    ops = {cell.op for cell in results.linear["tiny"]}
    assert ops >= {"F.linear", "bf16_linear", "w4a16_linear", "w4a8_linear"}
    assert {(cell.layer.name, cell.batch) for cell in results.linear["tiny"]} == {
        (layer, batch) for layer in ("qkv", "o", "gate_up", "down", "lm_head") for batch in (1, 8)
    }
    assert len(results.packing["tiny"]) == 5
    assert [(found.context, found.queries) for found in results.attention] == [(256, 1), (256, 3)]
    assert set(results.attention[0].seconds) == {"torch", "bf16", "int8", "int4"}
    assert len(results.bandwidth) == 2 and results.overhead["F.linear"] > 0


def test_only_the_parts_that_were_asked_for_run():
    found = bench.measure(plan(parts=["quantize_pack"], layers=[Layer("x", 64, 128)]), lambda line: None)
    assert list(found.packing) == [""] and not (found.linear or found.attention or found.overhead)


def test_an_op_that_this_build_lacks_is_left_out(monkeypatch):
    monkeypatch.delattr(kernels, "w4a8_linear")
    made = linear.candidates(torch.ones(1, 128).bfloat16(), linear.Weights(Layer("x", 32, 128), 1), ["avx2"])
    assert "w4a8_linear" not in made and "bf16_linear" in made
    monkeypatch.delattr(kernels, "paged_attention")
    assert not attention.available()
    assert bench.measure(plan(parts=["attention"]), lambda line: None).attention == []


def test_candidates_compute_the_same_product():
    weights = linear.Weights(Layer("x", 64, 256), 1)
    x = torch.randn(3, 256).bfloat16()
    exact = x.double() @ weights.bf16[0].double().T
    for name, (runs, nbytes, _) in linear.candidates(x, weights, [kernels.isa()]).items():
        if name == "aten int4pack":
            continue  # its levels are random
        off = (runs[0]().double() - exact).norm() / exact.norm()
        assert off < (0.2 if name.startswith("w4") else 0.01), name
        assert nbytes < 64 * 256 if name.startswith("w4") else nbytes == 64 * 256 * 2


def test_each_instruction_set_is_a_candidate_where_several_are_asked_for():
    isas = kernels.supported_isas()[:2]
    try:
        made = linear.candidates(torch.ones(1, 128).bfloat16(), linear.Weights(Layer("x", 32, 128), 1), isas)
        assert {f"bf16_linear {isa}" for isa in isas} <= set(made) and "F.linear" in made
        made[f"bf16_linear {isas[-1]}"].runs[0]()
        assert kernels.isa() == isas[-1]
    finally:
        kernels.set_isa("auto")


def test_the_summary_compares_whole_passes_and_names_the_worst_part():
    def cell(op: str, layer: str, count: int, batch: int, seconds: float, nbytes: int) -> Cell:
        return Cell(op, Layer(layer, 16, 16, count), batch, seconds, nbytes, read=100.0)

    cells = [
        cell("bf16_linear", "a", 2, 1, 2.0, 100), cell("bf16_linear", "b", 1, 1, 1.0, 100),
        cell("bf16_linear", "a", 2, 8, 6.0, 100), cell("bf16_linear", "b", 1, 8, 4.0, 100),
        cell("w4a8_linear", "a", 2, 8, 1.0, 25), cell("w4a8_linear", "b", 1, 8, 2.0, 25),
    ]  # fmt: skip
    found = {row.what: row for row in kernels_report.summary(Results(linear={"m": cells}))}
    reading = found["m bf16_linear, M=1"]
    assert reading.measured == pytest.approx(3 / 5) and reading.worst == pytest.approx(0.5)
    faster = found["m w4a8_linear, M=8"]
    assert faster.measured == pytest.approx(16 / 4) and faster.worst == pytest.approx(2.0)


def test_table_and_json_hold_the_figures(results):
    said = kernels_report.text(results, ABOUT)
    for part in ("tiny M=1", "gate_up 512x256", "whole pass", "4x1x64, context 256", "of a copy", "x bf16", "promised"):
        assert part in said
    found = json.loads(json.dumps(kernels_report.to_json(results, ABOUT)))
    assert found["bandwidth"]["read_lowest"] <= found["bandwidth"]["read"] <= found["bandwidth"]["read_highest"]
    assert {"model", "layer", "n", "k", "op", "batch", "seconds", "bytes", "read", "share"} <= set(found["linear"][0])
    assert len(found["summary"]) == len(kernels_report.summary(results))


def test_reading_takes_turns_with_the_ops_but_is_none_of_them():
    stream = Stream(1 << 20)
    (cells,) = linear.measure(Layer("x", 64, 128), [2], [kernels.isa()], 1 << 16, QUICK, stream)
    assert all(cell.read == cells[0].read > 0 for cell in cells)
    assert not any(cell.op.startswith("read") for cell in cells)
    assert Bandwidth(20e9, 18e9).text() == "20.0 GB/s read, 18.0 GB/s copied"
