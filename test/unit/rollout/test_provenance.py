"""What is written beside a figure: enough to repeat it, no path of a machine that was not in the command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sglang_er.rollout import provenance
from sglang_er.rollout.machine import Machine


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("scripts/bench_forward.py", "scripts/bench_forward.py --shape 0.5b"),
        ("/somewhere/.venv/bin/sglang-er", "sglang-er --shape 0.5b"),
        ("/somewhere/sglang_er/cli/__main__.py", "sglang-er --shape 0.5b"),
    ],
)
def test_a_script_is_named_as_such(program: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", [program, "--shape", "0.5b"])
    assert provenance.provenance()["command"] == said


def test_the_command_is_quoted_as_a_shell_takes_it():
    found = provenance.provenance(["bench", "rollout", "--json", "a b.json"])
    assert found["command"] == "sglang-er bench rollout --json 'a b.json'"
    assert found["version"] and found["packages"]["torch"]


def test_only_variables_that_change_speed_are_kept():
    environ = {"OMP_NUM_THREADS": "2", "HOME": "h", "SGLANG_ER_CONFIG": "x", "SGLANG_ER_CPU_THREADS": "1"}
    assert provenance.speed_variables(environ) == {"OMP_NUM_THREADS": "2", "SGLANG_ER_CPU_THREADS": "1"}


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path: Path):
    assert provenance.commit(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert provenance.commit(tmp_path) is None


def test_machine_facts_hold_the_load_on_both_sides():
    facts = provenance.machine_facts(Machine("c", 2, (1.0, 2.0, 3.0)), Machine("c", 2, (4.0, 5.0, 6.0)))
    assert facts["load_before"][0] == 1.0 and facts["load_after"][0] == 4.0
