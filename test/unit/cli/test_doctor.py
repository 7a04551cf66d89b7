"""`sglang-er doctor`: facts, one line for every problem, and the exit code."""

from __future__ import annotations

import json

import pytest

from sglang_er import kernels
from sglang_er.bench import stream
from sglang_er.cli import doctor
from sglang_er.cli import main as cli
from sglang_er.cli.doctor import Findings
from sglang_er.engine import compat, host
from sglang_er.rollout import cores, memory


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.Stream, "measure", lambda *_: stream.Bandwidth(20e9, 18e9))
    monkeypatch.setattr(stream, "_PIECE", 1 << 20)
    monkeypatch.setattr(stream, "FOOTPRINT", 2 << 20)
    for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "SGLANG_ER_CPU_THREADS", "SGLANG_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")


def checked(check) -> Findings:
    found = Findings()
    check(found)
    return found


def test_a_healthy_machine_has_all_facts_and_exit_0(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for part in ("0.5.21 (supported)", "affinity", "20.0 GB/s read", "instruction set", "compiled library", "cache"):
        assert part in said
    assert said.endswith("no problem found\n")


def test_json_holds_the_same(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["facts"]["SGLang"] == "0.5.21 (supported)"


def test_a_problem_is_a_line_and_exit_1(monkeypatch, capsys):
    monkeypatch.setattr(compat, "installed_sglang", lambda: "0.4.0")
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "0.4.0 (NOT supported)" in said and "problem: sglang-er supports SGLang 0.5.15.post1, 0.5.21" in said


def test_a_package_that_is_missing_is_one_problem(monkeypatch):
    def fails(found):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(doctor, "CHECKS", (fails, fails))
    assert cli.main(["doctor"]) == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OMP_NUM_THREADS", "4096", "OMP_NUM_THREADS=4096 with"),
        ("SGLANG_ER_CPU_THREADS", "999", "SGLANG_ER_CPU_THREADS=999 with"),
    ],
)
def test_more_threads_than_cores_are_a_problem(name, value, said, monkeypatch):
    monkeypatch.setenv(name, value)
    (problem,) = checked(doctor.check_variables).problems
    assert problem.startswith(said) and "unset it" in problem


@pytest.mark.parametrize(("name", "value"), [("OMP_PROC_BIND", "true"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_harmful_openmp_settings_are_advised_against(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    found = checked(doctor.check_variables)
    assert len(found.advice) == 1 and name in found.advice[0] and not found.problems


def test_a_wrong_option_in_the_environment_is_a_problem(monkeypatch):
    monkeypatch.setenv("SGLANG_ER_GAMA", "3")
    assert checked(doctor.check_configuration).problems == ["SGLANG_ER_GAMA: unknown option; did you mean gamma?"]


def test_a_library_that_is_not_built_is_a_problem(monkeypatch):
    def missing() -> int:
        raise kernels.LibraryError("libx.so is not built: run 'make setup'")

    monkeypatch.setattr(kernels, "library_version", missing)
    assert checked(doctor.check_kernels).problems == ["libx.so is not built: run 'make setup'"]


def test_slow_kernels_are_named(monkeypatch):
    monkeypatch.setattr(kernels, "isa", lambda: "portable")
    assert "portable" in checked(doctor.check_kernels).advice[0]


def test_a_platform_that_is_kept_out_is_named(monkeypatch):
    monkeypatch.setenv("SGLANG_PLATFORM", "other")
    monkeypatch.setattr(host, "accelerator_present", lambda: False)
    found = checked(doctor.check_platform)
    assert found.facts["platform"] == "other" and "SGLANG_PLATFORM=sglang_er_cpu" in found.advice[0]


def test_little_memory_and_a_small_quota_are_named(monkeypatch):
    monkeypatch.setattr(memory, "total_and_available", lambda: (8 << 30, 1 << 30))
    assert "1.0 GiB" in checked(doctor.check_memory).advice[0]
    monkeypatch.setattr(cores, "quota", lambda: 0.5)
    assert any("quota is 0.5" in line for line in checked(doctor.check_cores).advice)


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    (problem,) = checked(doctor.check_cache).problems
    assert "XDG_CACHE_HOME" in problem


def test_affinity_is_shown_as_ranges():
    assert doctor._ranges([0, 1, 2, 5, 8, 9]) == "0-2,5,8-9"
