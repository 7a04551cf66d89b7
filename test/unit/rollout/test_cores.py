"""Cores that this process may use: affinity, quota and hardware threads, read from made-up system files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_er.rollout import cores


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def topology(root: Path, number: int, package: int, core: int) -> None:
    base = f"sys/devices/system/cpu/cpu{number}/topology"
    write(root, f"{base}/physical_package_id", str(package))
    write(root, f"{base}/core_id", str(core))


def test_two_hardware_threads_are_one_core_and_packages_number_their_own(tmp_path: Path):
    for number, (package, core) in enumerate([(0, 0), (0, 0), (0, 1), (1, 0)]):
        topology(tmp_path, number, package, core)
    assert cores.physical([0, 1, 2, 3], tmp_path) == 3
    assert cores.physical([0, 1], tmp_path) == 1
    assert cores.physical([7, 8], tmp_path) == 2  # nothing is known about them


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a",
                "sys/fs/cgroup/a/cpu.max": "400000 100000",
                "sys/fs/cgroup/cpu.max": "200000 100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_the_tightest_quota_of_all_groups_counts(files: dict[str, str], expected: float | None, tmp_path: Path):
    for path, text in files.items():
        write(tmp_path, path, text)
    assert cores.quota(tmp_path) == expected


@pytest.mark.parametrize(("limit", "threads"), [(None, 4), ("250000 100000", 2), ("50000 100000", 1)])
def test_threads_are_the_physical_cores_within_the_quota(limit, threads, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cores, "allowed", lambda: [0, 1, 2, 3])
    if limit is not None:
        write(tmp_path, "proc/self/cgroup", "0::/")
        write(tmp_path, "sys/fs/cgroup/cpu.max", limit)
    assert cores.default_threads(tmp_path) == threads


def test_this_machine_has_at_least_one_core():
    assert 1 <= cores.default_threads() <= len(cores.allowed())
