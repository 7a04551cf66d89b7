"""From records to a table: the golden file, what is left out and why, and the records that a real run writes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.gpu_records import Record, bench, record, write

from sglang_er import kernels
from sglang_er.bench import kernel_table
from sglang_er.bench.linear import Layer
from sglang_er.cli import main as cli
from sglang_er.kernels import registry, table_files
from sglang_er.kernels.source_key import source_key
from sglang_er.rollout import gpu_records
from sglang_er.rollout.gpu_records import RecordsError

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import gpu_check
from gpu import bench_kernels, bench_works
from gpu.records import Identity, Journal
from gpu.sections import Context, Options

GOLDEN = Path(__file__).with_name("kernel_table_golden.json")
LAYER = "qkv 4608x3584"


def linear(name: str, times: dict[int, float], what: str = LAYER, outputs: int = 4608, **changes) -> Record:
    rows = {
        f"M={rows}": {"us": us, "bytes": 1, "M": rows, "at": ["group 128", [rows, outputs, 3584]]}
        for rows, us in times.items()
    }
    return bench("w4a16_linear", name, what, rows, **changes)


def attention(name: str, context: int, us: float, requests: int = 8) -> Record:
    row = {"us": us, "bytes": 1, "context": context, "at": ["int4 head_dim 128", [requests, 28, 4]]}
    return bench("paged_attention", name, f"B={requests} S={context}", {"decode int4": row})


SYNTHETIC = [
    record("bench_kernels", "copy", {"bytes_per_second": 4.2e12}),
    linear("cuda", {1: 5.0, 8: 6.0, 64: 15.0}),
    linear("triton", {1: 7.0, 8: 6.5, 64: 12.0, 128: 20.0}),  # 128: alone, so there is nothing to choose
    linear("cuda", {1: 90.0}, "lm_head 152064x3584", outputs=152064),
    bench("quantize_pack", "cuda", LAYER, {"": {"us": 11.0, "at": ["group 128", [4608, 3584]]}}),
    bench("quantize_pack", "triton", LAYER, {"": {"us": 10.0, "at": ["group 128", [4608, 3584]]}}),
    attention("cuda", 2048, 10.0),
    attention("triton", 2048, 8.0),
    attention("cuda", 8192, 20.0),
    attention("triton", 8192, 30.0),
    attention("triton", 16384, 60.0),  # the other one has no such context
    bench("softmax_rows", "triton", "", {"1x152064": {"us": 5.0}}),
    bench("softmax_rows", "cuda", "", {"1x152064": {"us": 4.0}}),
    record("bench_kernels", "kv_shadow_store cuda", {"reason": "serves none"}, status="skipped"),
    record("kernels", "w4a16_linear triton", {"cases": {}}),
]


def test_the_golden_example():
    """The format, line by line; written anew with `.to_text()` when it changes on purpose."""
    table = kernel_table.make(SYNTHETIC)
    assert table.to_text() == GOLDEN.read_text()
    assert table_files.of_text(GOLDEN.read_text(), "golden") == table
    assert kernel_table.summary(table) == [
        "paged_attention: cuda at 1 of 1 sizes",
        "quantize_pack: triton at 1 of 1 sizes",
        "w4a16_linear: cuda at 2, triton at 1 of 3 sizes",
    ]


def linear_times(records: list[Record]) -> dict:
    return dict(kernel_table.make(records).ops["w4a16_linear"]["group 128"])


def test_the_newest_measurement_of_a_cell_counts():
    again = linear("cuda", {1: 3.0}, date="2026-12-02T09:00:00Z", commit="def456")
    records = sorted([again, *SYNTHETIC], key=lambda entry: entry["date"])
    table = kernel_table.make(records)
    assert linear_times(records) == {(1, 4608, 3584): {"cuda": 3.0, "triton": 7.0}}
    assert (table.commit, table.date) == ("def456", "2026-12-02")


def test_times_of_other_kernels_are_not_mixed_in():
    changed = [linear("cuda", {1: 3.0}), linear("triton", {1: 2.0})]
    for entry in changed:
        entry["values"]["kernels"], entry["date"] = "key2", "2026-12-02T09:00:00Z"
    table = kernel_table.make([*SYNTHETIC, *changed])
    assert table.kernels == "key2" and list(table.ops) == ["w4a16_linear"]


def test_who_was_found_wrong_is_left_out():
    failed = record("kernels", "w4a16_linear triton", {}, status="failed", date="2026-12-01T11:00:00Z")
    table = kernel_table.make([*SYNTHETIC, failed])
    assert "w4a16_linear" not in table.ops and "quantize_pack" in table.ops
    repaired = record("kernels", "w4a16_linear triton", {}, date="2026-12-01T12:00:00Z")
    assert kernel_table.make([*SYNTHETIC, failed, repaired]) == kernel_table.make(SYNTHETIC)


def test_records_of_another_device_are_not_mixed_in():
    other = [linear("cuda", {1: 1.0}, device="NVIDIA B200"), linear("triton", {1: 2.0}, device="NVIDIA B200")]
    with pytest.raises(RecordsError, match="records of NVIDIA B200, NVIDIA H200: choose one with --device"):
        kernel_table.make([*SYNTHETIC, *other])
    assert kernel_table.make([*SYNTHETIC, *other], "NVIDIA H200") == kernel_table.make(SYNTHETIC)
    assert kernel_table.make([*SYNTHETIC, *other], "NVIDIA B200").device == "NVIDIA B200"


@pytest.mark.parametrize(
    ("records", "device", "words"),
    [
        ([], None, "records of no device"),
        (SYNTHETIC[:2], "NVIDIA B200", "no measurement of section bench_kernels on NVIDIA B200"),
        (SYNTHETIC[:1], None, "no measurement of section bench_kernels on NVIDIA H200"),
        (SYNTHETIC[:2], None, "NVIDIA H200: nowhere were two implementations of one op measured at the same sizes"),
    ],
)
def test_records_that_decide_nothing_are_one_line(records: list[Record], device: str | None, words: str):
    with pytest.raises(RecordsError, match=words):
        kernel_table.make(records, device)


# -- files and the command -------------------------------------------------------------------------------------------


def test_cut_off_lines_and_dry_runs_are_left_out(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", [*SYNTHETIC, linear("cuda", {1: 0.1}, dry_run=True)])
    path.write_text(path.read_text() + '{"section": "bench_k')
    assert gpu_records.read([path]) == SYNTHETIC


def test_the_command_writes_the_table(tmp_path: Path, capsys):
    path = write(tmp_path / "gpu_check.jsonl", SYNTHETIC)
    assert cli.main(["kernel-table", str(path)]) == 0
    assert (tmp_path / "kernel_table.json").read_text() == GOLDEN.read_text()
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA H200, commit abc123, 2026-12-01\n") and "w4a16_linear: cuda at 2" in out
    assert "times of other versions of the kernels" in out and "kernels/tables/nvidia_h200.json" in out
    assert cli.main(["kernel-table", str(path), "--out", str(tmp_path / "t.json")]) == 0
    assert (tmp_path / "t.json").is_file()


@pytest.mark.parametrize("content", [None, "no json\n", '{"section": 1}\n', b"\xff\xfe"])
def test_a_mistake_is_one_line(content: str | bytes | None, tmp_path: Path, capsys):
    path = tmp_path / "r.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["kernel-table", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sglang-er kernel-table: ") and "r.jsonl" in error and error.count("\n") == 1


def test_the_check_writes_the_table_at_its_end(tmp_path: Path):
    path = write(tmp_path / "gpu_check.jsonl", SYNTHETIC)
    said = gpu_check.write_table(path, "NVIDIA H200")
    assert "w4a16_linear: cuda at 2" in said and (tmp_path / "kernel_table.json").read_text() == GOLDEN.read_text()
    (tmp_path / "kernel_table.json").unlink()
    assert gpu_check.write_table(path, "NVIDIA B200").startswith("no kernel table: no measurement of section")
    assert not (tmp_path / "kernel_table.json").exists()


# -- the records that a run writes -----------------------------------------------------------------------------------


@pytest.fixture
def second():
    """Another implementation of `w4a16_linear` for CPUs, beside the compiled one; serves single rows only."""
    entry = next(entry for entry in registry.implementations("w4a16_linear") if entry.name == "cpu")
    again = replace(entry, name="second", serves=lambda x, *_: x.shape[0] == 1, proven=False)
    registry.register("w4a16_linear", again)
    yield
    registry._implementations["w4a16_linear"].remove(again)
    registry.candidates.cache_clear()


def test_what_bench_kernels_records_makes_a_table(tmp_path: Path, second):
    """Timed for real, small and on this CPU; sizes that one does not serve are left out, its others stay."""
    options = Options(tmp_path, dry_run=True)
    journal = Journal(tmp_path / "r.jsonl", Identity("abc", "A CPU", False, {}))
    for cell in [*bench_kernels.cells(options), *bench_kernels.more_cells(options)]:
        if cell.name.startswith(("w4a16_linear", "quantize_pack")) and "humming" not in cell.name:
            journal.append("bench_kernels", cell.name, "passed", 1.0, cell.run(Context(options)))
    records = gpu_records.read([journal.path])
    assert {"quantize_pack cpu", "quantize_pack marlin"} <= {" ".join(r["cell"].split()[:2]) for r in records}
    table = kernel_table.make(records)
    assert list(table.ops) == ["w4a16_linear"]  # Marlin packs into a layout of its own: nothing to choose
    cells = table.ops["w4a16_linear"]["group 128"]
    assert {sizes[0] for sizes in cells} == {1} and (1, 384, 256) in cells
    assert all(set(times) == {"cpu", "second"} and min(times.values()) > 0 for times in cells.values())
    assert (table.kernels, table.dtype) == (source_key(), "bfloat16")
    assert table_files.of_text(table.to_text(), "t") == table


def test_weights_in_a_librarys_layout_have_no_place_in_the_table(tmp_path: Path):
    """A layer's layout is decided once, and not by the rows of a call."""
    faster = [linear(name, {1: 1.0, 8: 1.0}) for name in ("marlin", "humming")]
    faster.append(bench("quantize_pack", "marlin", LAYER, {"": {"us": 1.0}}))
    for row in (row for entry in faster for row in entry["values"]["rows"].values()):
        row.pop("at", None)
    assert kernel_table.make([*SYNTHETIC, *faster]) == kernel_table.make(SYNTHETIC)
    layer = Layer("o", 64, 256, 1)
    for name, placed in (("marlin", False), ("cpu", True)):
        works = [*bench_works.linear("w4a16_linear", layer, [1, 2], name, "cpu").values()]
        works += bench_works.pack(layer, name, "cpu").values()
        assert [("at" in work.facts) for work in works] == [placed] * len(works)
    assert isinstance(works[0].runs[0].args[1], kernels.PackedWeight)
    marlin = bench_works.linear("w4a16_linear", layer, [1], "marlin", "cpu")["M=1"]
    assert all(isinstance(run.args[1], kernels.MarlinWeight) for run in marlin.runs)
    assert len({run.args[1].packed.data_ptr() for run in marlin.runs}) == len(marlin.runs)


def test_cells_have_names_of_their_own_and_the_first_model_comes_first():
    names, more = (
        [cell.name for cell in cells(Options(Path()))] for cells in (bench_kernels.cells, bench_kernels.more_cells)
    )
    assert len({*names, *more}) == len(names) + len(more) and names[0] == "copy"
    assert "quantize_pack cuda lm_head 152064x3584" in names
    assert all("Llama" not in name and "Qwen3-4B" not in name for name in names)
    assert "w4a16_linear cuda Llama-3.1-8B qkv 6144x4096" in more
    assert any("Qwen3-4B gate_up 19456x2560" in name for name in more)
    assert bench_kernels.BATCHES == (1, 2, 4, 8, 16, 32, 64, 128)


def test_a_record_says_of_which_model_and_how_often(tmp_path: Path):
    options = Options(tmp_path, dry_run=True)
    cell = next(cell for cell in bench_kernels.cells(options) if cell.name.startswith("bf16_linear torch gate_up"))
    values = json.loads(json.dumps(cell.run(Context(options))))
    assert (values["model"], values["layer"], values["count"]) == ("tiny", "gate_up", 4)
    assert {row["M"] for row in values["rows"].values()} == set(bench_kernels.DRY_BATCHES)
