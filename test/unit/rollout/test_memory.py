"""Memory and huge pages, read from made-up system files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_er.rollout import memory

KIB = 1024


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, (1000 * KIB, 600 * KIB)), ("max", (1000 * KIB, 600 * KIB)), (str(500 * KIB), (500 * KIB, 400 * KIB))],
)
def test_a_cgroup_limit_lowers_what_there_is(limit, expected, tmp_path: Path):
    write(tmp_path, "proc/meminfo", "MemTotal:  1000 kB\nMemFree:  1 kB\nMemAvailable:  600 kB")
    if limit is not None:
        write(tmp_path, "sys/fs/cgroup/memory.max", limit)
        write(tmp_path, "sys/fs/cgroup/memory.current", str(100 * KIB))
    assert memory.total_and_available(tmp_path) == expected


def test_the_setting_of_huge_pages_is_the_one_in_brackets(tmp_path: Path):
    assert memory.huge_pages(tmp_path) is None
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    assert memory.huge_pages(tmp_path) == "madvise"
