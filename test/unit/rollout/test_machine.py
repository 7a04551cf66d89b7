"""The machine's name as it is printed, and how many threads are fair on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_er.rollout import machine


@pytest.mark.parametrize(("cores", "load", "threads"), [(2, 3.0, None), (2, 4.0, 1), (2, 9.0, 1), (16, 48.0, 4)])
def test_threads_are_a_fair_share_of_a_busy_machine_only(cores, load, threads):
    assert machine.fair_threads(machine.Machine("c", cores, (load, load, load))) == threads


def test_a_hidden_model_name_is_completed(tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: Some(R)  Processor\ncpu family\t: 6\nmodel\t\t: 207\nmodel : 1\n")
    assert machine._cpu_model(cpuinfo) == "Some(R) Processor (family 6, model 207)"
    assert machine._cpu_model(tmp_path / "none")


def test_the_text_has_cpu_cores_and_load():
    assert machine.Machine("c", 2, (1.0, 2.0, 3.0)).text() == "c, 2 cores, load average 1.0 2.0 3.0"


def test_processor_time_is_that_of_all_processes_of_the_session(tmp_path: Path):
    for pid, session, user, system in ((10, 7, 300, 100), (11, 7, 50, 50), (12, 8, 900, 900)):
        (tmp_path / str(pid)).mkdir()
        head = f"{pid} (a name) with) S 1 7 {session} 0 -1 0 0 0 0 0 {user} {system} 0 0\n"
        (tmp_path / str(pid) / "stat").write_text(head)
    assert machine.session_cpu_seconds(7, tmp_path) * os.sysconf("SC_CLK_TCK") == 500
