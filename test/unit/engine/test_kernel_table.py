"""The kernel table at start-up: the first rank's file serves all ranks, and a file that is no use stops all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from support.ranks import RANKS, install_table

from sglang_er.config import ConfigError
from sglang_er.engine import kernel_table
from sglang_er.engine.ranks import ALONE
from sglang_er.kernels import registry
from sglang_er.kernels.dispatch_table import DispatchTable
from sglang_er.kernels.source_key import source_key

OPS = {"w4a16_linear": {"group 128": {(1, 64, 64): {"cuda": 1.0, "triton": 2.0}}}}


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    monkeypatch.setattr(registry, "_table", None)
    yield
    registry._choices.cache_clear()


def write(path: Path, key: str | None = None) -> DispatchTable:
    table = DispatchTable("A GPU", key or source_key(), "bfloat16", "abc", "2026-12-01", OPS)
    path.write_text(table.to_text())
    return table


def test_a_table_is_in_use_and_said_so(tmp_path: Path, caplog):
    table = write(tmp_path / "t.json")
    with caplog.at_level("INFO"):
        kernel_table.install(str(tmp_path / "t.json"), "A GPU", ALONE)
    assert registry.table_in_use() == table
    assert "chosen by size with the table t.json, measured with commit abc on 2026-12-01" in caplog.text


def test_an_outdated_table_is_not_used_and_said_so_once(tmp_path: Path, caplog):
    write(tmp_path / "t.json", key="0" * 16)
    kernel_table.install(str(tmp_path / "t.json"), "A GPU", ALONE)
    assert registry.table_in_use() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "not used" in caplog.text


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_without_a_table_nothing_is_said(choice: str, caplog):
    with caplog.at_level("INFO"):
        kernel_table.install(choice, "A GPU", ALONE)
    assert registry.table_in_use() is None and not caplog.records


def test_a_file_that_is_no_use_is_one_line(tmp_path: Path):
    write(tmp_path / "t.json")
    with pytest.raises(ConfigError, match=r"^kernel_table: .*t\.json: times of a A GPU, this is a Another") as error:
        kernel_table.install(str(tmp_path / "t.json"), "Another", ALONE)
    assert "\n" not in str(error.value)


def test_what_is_chosen_is_told_of_every_op(monkeypatch):
    """Of a draft pass and of verification; here of a CPU, which has no table."""
    ops = ("quantize_pack", "w4a16_linear", "w4a8_linear", "paged_attention", "kv_shadow_store")
    assert kernel_table.chosen("cpu", torch.bfloat16) == dict.fromkeys(
        (*ops, "softmax_rows", "draft_sample", "verify_chain"), "cpu"
    )
    monkeypatch.setattr(registry, "describe", lambda op, device, dtype: f"of {op} for {dtype}")
    found = kernel_table.chosen("cuda", torch.bfloat16)
    assert found["w4a16_linear"] == "of w4a16_linear for torch.bfloat16"
    assert found["choose_seeded"] == "of choose_seeded for torch.float32"


def test_the_first_ranks_table_serves_all(tmp_path: Path):
    """The second rank has no such file, and must not need one."""
    table = write(tmp_path / "table0.json")
    multiprocessing.spawn(install_table, args=(str(tmp_path), "A GPU"), nprocs=RANKS)
    for rank in range(RANKS):
        assert (tmp_path / f"table{rank}.got").read_text() == repr(table)


def test_no_rank_starts_where_the_first_ranks_file_is_no_use(tmp_path: Path):
    write(tmp_path / "table0.json"), write(tmp_path / "table1.json")
    multiprocessing.spawn(install_table, args=(str(tmp_path), "Another"), nprocs=RANKS)
    first, second = ((tmp_path / f"table{rank}.got").read_text() for rank in range(RANKS))
    assert first == second and first.startswith("kernel_table: ") and "table0.json" in first
