"""Measured times and who is the fastest: sizes between and beyond those measured, the file, files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_er import kernels
from sglang_er.kernels import MarlinWeight, dispatch_table, registry, size_classes, source_key, table_files
from sglang_er.kernels.dispatch_table import DispatchTable, TableError
from sglang_er.kernels.kv_shadow import ShadowFormat

DEVICE = "Test GPU 1"
CELLS = {
    (1, 4096, 4096): {"cuda": 5.0, "triton": 7.0},
    (4, 4096, 4096): {"cuda": 9.0, "triton": 7.0},
    (4, 65536, 4096): {"triton": 70.0},
}


def table(kernels_key: str = "", device: str = DEVICE, ops=None) -> DispatchTable:
    ops = {"w4a16_linear": {"group 128": CELLS}} if ops is None else ops
    return DispatchTable(device, kernels_key or source_key.source_key(), "bfloat16", "abc", "2026-12-01", ops)


def fastest(
    rows: int, outputs: int = 4096, inputs: int = 4096, group: int = 128, among=("cuda", "triton")
) -> list[str]:
    return table().fastest("w4a16_linear", size_classes.linear(rows, outputs, inputs, group), among)


def test_the_nearest_size_in_log_space_decides():
    assert fastest(1) == ["cuda", "triton"] and fastest(4) == ["triton", "cuda"]
    assert fastest(3) == ["triton", "cuda"]  # 1.58 doublings from 1, .42 from 4
    assert fastest(1, 4000, 5000) == ["cuda", "triton"]
    assert fastest(7, 5000, 3000) == ["triton", "cuda"]


def test_of_equally_near_sizes_the_smaller_counts():
    found = table(ops={"kv_shadow_store": {"k": {(4, 64): {"cuda": 1.0}, (9, 64): {"triton": 1.0}}}})
    assert found.fastest("kv_shadow_store", ("k", (6, 64)), {"cuda", "triton"}) == ["cuda"]
    assert found.fastest("kv_shadow_store", ("k", (7, 64)), {"cuda", "triton"}) == ["triton"]


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"),
    [(8, 4096, 4096, 128), (4, 2048, 4096, 128), (4, 4096, 9000, 128), (4, 4096, 4096, 64), (0, 4096, 4096, 128)],
)
def test_sizes_that_are_not_in_the_table_have_no_order(rows: int, outputs: int, inputs: int, group: int):
    assert fastest(rows, outputs, inputs, group) == []


def test_only_who_may_compute_is_ranked():
    assert fastest(4, among={"cuda", "reference"}) == ["cuda"]
    assert fastest(4, 65536) == ["triton"]
    assert table().winners("w4a16_linear", {"cuda", "triton"}) == {"cuda": 1, "triton": 2}


def test_verification_has_no_sizes():
    """A choice by the number of rows would change a row's bits with the batch: docs of size_classes."""
    drafts = {"w4a16_linear", "w4a8_linear", "quantize_pack", "paged_attention", "kv_shadow_store"}
    assert set(size_classes.CLASSES) == drafts
    engine = Path(registry.__file__).parents[1] / "engine"
    callers = {path.name for path in engine.rglob("*.py") if "kernels.paged_attention(" in path.read_text()}
    assert callers == {"attention.py", "draft_attention.py"}  # the first one serves CPUs, which have no table
    assert (engine / "cpu" / "attention.py").is_file()


class Caught(Exception):
    pass


@pytest.mark.parametrize(
    ("op", "call", "at"),
    [
        (
            "w4a16_linear",
            lambda: kernels.w4a16_linear(torch.ones(3, 256), kernels.quantize_pack(torch.ones(32, 256), 64)),
            ("group 64", (3, 32, 256)),
        ),
        ("quantize_pack", lambda: kernels.quantize_pack(torch.ones(32, 256)), ("group 128", (32, 256))),
        (
            "quantize_pack",
            lambda: kernels.quantize_pack(torch.ones(32, 256), clip_search=True),
            ("group 128 clip search", (32, 256)),
        ),
        ("w4a16_linear", lambda: kernels.w4a16_linear(torch.ones(3, 256), MarlinWeight.empty(64, 256, 64)), None),
        ("quantize_pack", lambda: kernels.quantize_pack(torch.ones(64, 256), implementation="marlin"), None),
        ("kv_shadow_store", lambda: _stored("int8"), ("int8 head_dim 64", (5, 2))),
        ("paged_attention", lambda: _attended(1), ("pool head_dim 64", (2, 4, 2))),
        ("paged_attention", lambda: _attended(1, shadow="int4"), ("int4 head_dim 64", (2, 4, 2))),
        ("paged_attention", lambda: _attended(2), None),
        ("paged_attention", lambda: _attended(1, window=7), None),
    ],
)
def test_sizes_are_those_of_a_real_call(op: str, call, at, monkeypatch):
    """The ops pass the registry what the classes look at."""
    seen = []

    def run(name: str, *rest: object) -> None:
        if name == op:
            seen.append(size_classes.CLASSES[op].at(*rest[3:]))
            raise Caught
        registry.run(name, *rest)

    for module in ("ops", "attention_ops"):
        monkeypatch.setattr(f"sglang_er.kernels.{module}.run", run)
    with pytest.raises(Caught):
        call()
    assert seen == [at]
    assert at is None or len(at[1]) == len(size_classes.CLASSES[op].names)


def _stored(format: ShadowFormat) -> None:
    pool = torch.ones(9, 2, 64)
    kernels.kv_shadow_store(pool, pool, torch.arange(5), kernels.KvShadow.empty(9, 2, 64, 64, format))


def _attended(queries: int, shadow: ShadowFormat | None = None, window: int = -1) -> None:
    pool, requests = torch.ones(8, 2, 64), 2
    copy = {"shadow": kernels.KvShadow.empty(8, 2, 64, 64, shadow or "int4"), "valid": torch.ones(8, dtype=torch.uint8)}
    kernels.paged_attention(
        torch.ones(requests * queries, 4, 64),
        pool,
        pool,
        torch.arange(8, dtype=torch.int32).view(2, 4),
        torch.arange(requests),
        torch.arange(requests + 1) * queries,
        torch.full((requests,), 4),
        scale=1.0,
        window=window,
        **(copy if shadow else {}),
    )


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written():
    assert table_files.of_text(table().to_text(), "t") == table()


def content(**changes: object) -> dict:
    return json.loads(table().to_text()) | changes


def one_op(op: str, sizes: list[str], cell: dict) -> dict:
    return content(ops={op: {"sizes": sizes, "kinds": {"group 128": [cell]}}})


LINEAR = ["rows", "outputs", "inputs"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "no kernel table in format 1"),
        (content(format=2), "no kernel table in format 1"),
        (content(kernels=None), "kernels is missing"),
        (content(ops=[]), "damaged"),
        (one_op("softmax_rows", ["rows"], {}), "op 'softmax_rows' is not chosen by size, those that are: w4a16_linear"),
        (one_op("w2a2_linear", ["rows"], {}), "op 'w2a2_linear' is not chosen by size"),
        (one_op("w4a16_linear", ["M", "N", "K"], {}), "w4a16_linear has the sizes M, N, K, expected rows, outputs"),
        (one_op("w4a16_linear", LINEAR, {"at": [1, 2], "us": {}}), "at [1, 2]: expected 3 sizes from 1 up"),
        (one_op("w4a16_linear", LINEAR, {"at": [1, 2, 0], "us": {}}), "at [1, 2, 0]: expected 3 sizes from 1 up"),
        (
            one_op("w4a16_linear", LINEAR, {"at": [1, 2, 3], "us": {"marlin": 1}}),
            # of no op: a layer's layout is decided once, and not by the rows of a call
            "no implementation 'marlin' to choose by size, there are: reference, cpu, cuda, triton",
        ),
        (one_op("w4a16_linear", LINEAR, {"at": [1, 2, 3], "us": {"cuda": 0}}), "cuda takes 0, expected microseconds"),
        (one_op("w4a16_linear", LINEAR, {"at": [1, 2, 3], "us": {"cuda": "1"}}), "cuda takes '1', expected"),
        (one_op("w4a16_linear", LINEAR, {"at": 1}), "damaged (TypeError"),
        (content(device="Test GPU 2"), "times of a Test GPU 2, this is a Test GPU 1"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(wrong: str | dict, words: str, tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(wrong if isinstance(wrong, str) else json.dumps(wrong))
    with pytest.raises(TableError) as error:
        table_files.find(str(path), DEVICE)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and words in line and "\n" not in line and "kernel_table to off" in line


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path):
    with pytest.raises(TableError, match=r"none.json: cannot read the kernel table: No such file"):
        table_files.find(str(tmp_path / "none.json"), DEVICE)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match=r"binary.json: cannot read the kernel table: no text"):
        table_files.find(str(tmp_path / "binary.json"), DEVICE)


def test_the_package_brings_a_table_for_its_device(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(table_files, "FOLDER", tmp_path)
    assert table_files.find("auto", DEVICE) == table_files.Found()
    (tmp_path / "test_gpu_1.json").write_text(table().to_text())
    found = table_files.find("auto", DEVICE)
    assert found.text == table().to_text() and not found.warning
    assert found.shown == "test_gpu_1.json, measured with commit abc on 2026-12-01"
    assert table_files.find("off", DEVICE) == table_files.Found()


def test_times_of_other_kernels_are_not_used_and_said_so(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(table(kernels_key="0" * 16).to_text())
    found = table_files.find(str(path), DEVICE)
    assert not found.text
    assert found.warning.startswith("kernel table t.json, measured with commit abc on 2026-12-01, is about other")


def test_shipped_tables_are_sound():
    """None yet; whoever adds one learns here what is wrong with it."""
    for path in table_files.FOLDER.glob("*.json"):
        shipped = table_files.of_text(path.read_text(), path.name)
        assert path.name == table_files.file_name(shipped.device)


def test_the_key_follows_the_sources(tmp_path: Path, monkeypatch):
    for name in ("cuda", "include"):
        (tmp_path / name).symlink_to(Path(source_key.build.sources()) / name)
    before = source_key.source_key()
    source_key.source_key.cache_clear()
    monkeypatch.setattr(source_key.build, "sources", lambda: tmp_path)
    try:
        assert source_key.source_key() == before  # wherever the sources lie
        (tmp_path / "cuda").unlink()
        (tmp_path / "cuda").mkdir()
        for path in (Path(dispatch_table.__file__).parents[3] / "csrc" / "cuda").iterdir():
            if path.is_file():
                text = path.read_text() + ("// another\n" if path.name == "quantize_pack.cu" else "")
                (tmp_path / "cuda" / path.name).write_text(text)
        source_key.source_key.cache_clear()
        assert source_key.source_key() != before
    finally:
        source_key.source_key.cache_clear()
