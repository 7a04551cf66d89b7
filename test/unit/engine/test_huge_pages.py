"""Huge pages are asked for in place; what the kernel says about the memory is the witness."""

import re
from pathlib import Path

import pytest
import torch

from sglang_er.engine.cpu import huge_pages

SMAPS = Path("/proc/self/smaps")


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes on huge pages of the mappings that `tensor` lies in."""
    begin, end, found, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) < end and int(bounds[2], 16) > begin
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.fixture
def filled():
    return torch.arange(8 << 20, dtype=torch.int32)


def test_pages_become_huge_and_keep_what_they_hold(filled):
    expected, address = filled.clone(), filled.data_ptr()
    backed, asked = huge_pages.back([filled])
    assert asked >= filled.nbytes
    if backed == 0:
        pytest.skip("this kernel gives no huge pages on demand")
    assert huge_bytes(filled) >= filled.nbytes - 2 * huge_pages.SIZE
    assert filled.data_ptr() == address
    assert torch.equal(filled, expected)


def test_views_of_one_storage_count_once(filled):
    assert huge_pages.back([filled[:100], filled[100:], filled.view(-1, 2)])[1] == huge_pages.back([filled])[1]


def test_memory_of_a_file_stays_what_it_is(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * huge_pages.SIZE))
    mapped = torch.from_file(str(path), shared=True, size=4 * huge_pages.SIZE, dtype=torch.uint8)
    huge_pages.back([mapped])
    mapped[5] = 7
    assert int(mapped.sum()) == 7
    assert path.read_bytes()[5] == 7


def test_nothing_to_back():
    assert huge_pages.back([]) == (0, 0)
    assert huge_pages.back([torch.empty(0)]) == (0, 0)


def test_without_madvise_nothing_happens(monkeypatch, filled):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert huge_pages.back([filled])[0] == 0
