"""The section `sanitizer`: what it starts, and what it makes of the tool's exit code, report, silence and absence. The
tool is pretended, as the real one needs a GPU; the process under it is the real one, on the CPU.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu import kernels, sanitized, sanitizer  # noqa: E402
from gpu.sections import CellError, Context, Options, Skip  # noqa: E402

from sglang_er.kernels import registry  # noqa: E402

# Runs the program as the real tool does, though on the CPU, then writes REPORT and ends with CODE.
PRETENDED = """#!{python}
import os, subprocess, sys, time
from pathlib import Path
arguments = sys.argv[1:]
begin = arguments.index(sys.executable)
folder = Path(__file__).parent
(folder / "options").write_text(chr(10).join(arguments[:begin]))
(folder / "caching").write_text(os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", ""))
if {hangs}:
    sleeper = subprocess.Popen(["sleep", "60"])
    (folder / "pid").write_text(str(sleeper.pid))
    time.sleep(60)
log = arguments[arguments.index("--log-file") + 1]
if {runs}:
    environment = dict(os.environ, TRITON_INTERPRET="1")
    subprocess.run([*arguments[begin:], "--dry-run"], env=environment, check=True)
Path(log).write_text({report!r})
sys.exit({code})
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
OUTSIDE = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _weigh+0x320 in sample_rows.py:83
=========     by thread (31,0,0) in block (4,0,0)
=========     Address 0x7f3c7ec000fc is out of bounds
========= ERROR SUMMARY: 1 error
"""
RACE = """========= COMPUTE-SANITIZER
========= Warning: Race reported between Write access at _pick+0x70 and Read access at _pick+0x90 [4 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""
UNWRITTEN = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<(int)512, float>(T3)+0x70
=========     by thread (31,0,0) in block (1,0,0)
========= ERROR SUMMARY: 1 error
"""
Pretend = Callable[..., Context]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """A GPU's context, with a pretended tool in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(report: str, code: int = 0, runs: bool = True, hangs: bool = False) -> Context:
        tool = tmp_path / sanitizer.PROGRAM
        tool.write_text(PRETENDED.format(python=sys.executable, report=report, code=code, runs=runs, hangs=hangs))
        tool.chmod(0o755)
        return Context(Options(tmp_path / "out"))

    return make


def check(context: Context, tool: str = "memcheck") -> dict[str, Any]:
    return sanitizer.check(tool, "sample_rows", "triton", context)


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_without_findings_it_is_the_kernels_own_judgement(tool: str, pretend: Pretend, tmp_path: Path):
    found = check(pretend(CLEAN), tool)
    assert found["passed"] and found["tool"] == tool and "no findings" in found["shown"]
    assert all(result["ok"] for result in found["cases"].values()) and len(found["cases"]) == 1
    options = (tmp_path / "options").read_text().splitlines()
    assert options[options.index("--tool") + 1] == tool
    assert options[options.index("--error-exitcode") + 1] == str(sanitizer.FOUND)
    # What initcheck does not watch being written would count as unwritten.
    assert ("--kernel-name-exclude" in options) == (tool != "initcheck")
    assert (tmp_path / "caching").read_text() == "1"


@pytest.mark.parametrize(
    ("tool", "report", "code", "runs", "said"),
    [
        ("memcheck", OUTSIDE, sanitizer.FOUND, True, "Invalid __global__ write of size 4 bytes"),
        ("memcheck", OUTSIDE, 255, False, "Invalid __global__ write of size 4 bytes"),  # its process broke of it
        ("racecheck", RACE, sanitizer.FOUND, True, "Warning: Race reported between"),
        ("racecheck", RACE, 0, True, "Warning: Race reported between"),
        ("synccheck", "", sanitizer.FOUND, True, "a finding without a report"),
        ("initcheck", OUTSIDE.replace("Invalid", "Uninitialized"), sanitizer.FOUND, True, "Uninitialized"),
        ("initcheck", UNWRITTEN + OUTSIDE, sanitizer.FOUND, True, "Uninitialized"),
        ("memcheck", UNWRITTEN, sanitizer.FOUND, True, "Uninitialized"),
    ],
)
def test_a_finding_fails_the_cell(tool: str, report: str, code: int, runs: bool, said: str, pretend: Pretend):
    found = check(pretend(report, code, runs), tool)
    assert not found["passed"] and f"{tool}: {said}" in found["shown"]
    assert len(found["report"]) == max(0, len(report.splitlines()) - 1) and (found["cases"] is not None) == runs


def test_what_initcheck_finds_in_kernels_of_torch_fails_nothing(pretend: Pretend):
    found = check(pretend(UNWRITTEN, sanitizer.FOUND), "initcheck")
    assert found["passed"] and "torch's libraries" in found["shown"]
    more = UNWRITTEN.replace("1 error", "80 errors")  # not all of them were printed
    assert not check(pretend(more, sanitizer.FOUND), "initcheck")["passed"]


def test_a_long_report_is_cut_in_the_record_and_whole_in_the_folder(pretend: Pretend, tmp_path: Path):
    report = OUTSIDE + "========= again\n" * 100
    found = check(pretend(report, sanitizer.FOUND))
    assert len(found["report"]) == sanitizer.REPORT_LINES
    assert (tmp_path / "out" / "sanitizer" / "memcheck-sample_rows-triton.log").read_text() == report


def test_a_tool_that_does_not_run_here_is_a_skip_with_its_words(pretend: Pretend):
    report = "========= COMPUTE-SANITIZER\n========= Unable to find injection library\n"
    with pytest.raises(Skip, match="does not run here: Unable to find injection library"):
        check(pretend(report, 13, runs=False))


def test_a_process_that_breaks_without_a_finding_is_an_error(pretend: Pretend):
    with pytest.raises(CellError, match="exit code 3 and said nothing"):
        check(pretend("", 3, runs=False))
    with pytest.raises(CellError, match="ERROR SUMMARY: 0 errors"):  # the tool ran: what broke is ours
        check(pretend(CLEAN, 255, runs=False))
    with pytest.raises(CellError, match="invalid choice: 'no_such_op'"):
        sanitizer.check(None, "no_such_op", "triton", Context(Options(pretend(CLEAN).options.out, dry_run=True)))


def test_a_result_of_before_counts_for_nothing(pretend: Pretend):
    assert check(pretend(CLEAN))["passed"]
    with pytest.raises(CellError):
        check(pretend(CLEAN, runs=False))


def test_what_hangs_is_ended_with_all_that_it_started(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sanitizer, "SECONDS", 2.0)
    with pytest.raises(CellError, match="did not end within 2 s"):
        check(pretend(CLEAN, hangs=True))
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "what the tool started still runs"
        time.sleep(0.05)


def test_a_machine_without_the_tool_skips_and_says_where_it_was_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitizer, "pip_folders", list)
    with pytest.raises(Skip, match=r"no compute-sanitizer in PATH, \$CUDA_HOME/bin, nor from pip"):
        check(Context(Options(tmp_path)))


def test_the_tool_is_found_in_cuda_home_and_in_the_package_of_pip(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pretend(CLEAN)
    for place in ("toolkit/bin", "site/nvidia/cu13/bin"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / sanitizer.PROGRAM).symlink_to(tmp_path / sanitizer.PROGRAM)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert sanitizer.find() == str(tmp_path / "toolkit/bin" / sanitizer.PROGRAM)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert sanitizer.find() == str(tmp_path / "site/nvidia/cu13/bin" / sanitizer.PROGRAM)


def test_an_implementation_that_serves_none_of_the_cases_is_skipped(tmp_path: Path):
    # Under the interpreter this op's only chosen case is on the CPU, which no CUDA kernel serves.
    with pytest.raises(Skip, match="cuda serves none of the 1 cases"):
        sanitizer.check(None, "quantize_pack", "cuda", Context(Options(tmp_path, dry_run=True)))


def test_cells_are_every_kernel_under_one_tool_then_under_the_next(tmp_path: Path):
    names = [cell.name.split() for cell in sanitizer.cells(Options(tmp_path))]
    kernels_of = {(op, name) for op in registry.ops() for name in kernels.names(op, "cuda")}
    expected = {pair for pair in kernels_of if pair[1] in sanitizer.IMPLEMENTATIONS}
    assert {(op, name) for _, op, name in names} == expected and len(names) == len(expected) * len(sanitizer.TOOLS)
    assert [tool for tool, *_ in names] == [tool for tool in sanitizer.TOOLS for _ in expected]
    dry = [cell.name for cell in sanitizer.cells(Options(tmp_path, dry_run=True))]
    assert dry and all(re.fullmatch(r"no tool \w+ triton", name) for name in dry)


def test_every_kernel_has_cases_of_section_kernels():
    for op in {cell.name.split()[1] for cell in sanitizer.cells(Options(Path()))}:
        assert len(sanitized.chosen(op, dry_run=False)) >= 2 and len(sanitized.chosen(op, dry_run=True)) == 1


def test_no_kernel_of_ours_is_taken_for_torchs():
    triton = (ROOT / "python/sglang_er/kernels/triton").glob("*.py")
    cuda = (ROOT / "csrc/cuda").iterdir()
    ours = [name for file in triton for name in re.findall(r"@triton\.jit.*\ndef (\w+)", file.read_text())]
    ours += [
        name
        for file in cuda
        for name in re.findall(r"__global__ void(?: __launch\w+\(.*\))?\s+(\w+)\(", file.read_text())
    ]
    assert {"attend", "combine", "quantize_pack_kernel", "attend_kernel", "_weigh"} <= set(ours)
    for name in ours:
        assert not sanitizer.FOREIGN.search(name) and not any(part in name for part in sanitizer.FOREIGN_SYMBOLS)
