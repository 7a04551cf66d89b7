"""Section `sanitizer`: a few cases of every CUDA and Triton kernel (`sanitized.py`) in a process under each tool of
NVIDIA's compute-sanitizer. A finding fails the cell, whose record keeps the report's first lines; all of it lies in the
folder `sanitizer` beside the records.

- `memcheck`: accesses outside of an allocation. Each tensor is one of its own (`PYTORCH_NO_CUDA_MEMORY_CACHING`): in
  the blocks of torch's allocator, a neighbour's memory would count as good.
- `racecheck`: hazards in shared memory alone. It does not see what blocks hand each other in global memory (sums of
  splits, counters of arrivals): those are for section `kernels`.
- `synccheck`: barriers that not all threads reach.
- `initcheck`: reads of global memory that nobody wrote, such as a split's sum that is missing.

Torch's own kernels and those of its libraries are not checked, so that the time goes to ours; by `initcheck` they are,
because it has to see what they write, but what it finds in them fails nothing.

A dry run starts the same process on the CPU without a tool.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_er import kernels as ops
from sglang_er.kernels import registry

from . import kernels
from .sections import Cell, CellError, Context, Options, Section, Skip, shortened

PROGRAM = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
IMPLEMENTATIONS = ("cuda", "triton")
FOUND = 86  # the program's exit code for a finding; those of Python and of the program itself are others
# Less than a server is given for a cell, so that a hang is recorded as ours.
SECONDS = 240.0
REPORT_LINES, PRINTED = 16, 50
SCRIPTS = Path(__file__).resolve().parents[1]

OPTIONS = (
    *("--error-exitcode", str(FOUND), "--print-limit", str(PRINTED), "--show-backtrace", "device"),
    # Compilers that Triton and the CUDA build start are not to be checked; torch takes its time to come to CUDA.
    *("--target-processes", "application-only", "--launch-timeout", "0"),
)
FOREIGN_SYMBOLS = ("at6native", "cutlass", "cublas", "gemm", "3cub")
FOREIGN = re.compile(r"\bat::|\bcutlass|cublas|gemm|\bcub::")
TOOL_OPTIONS = {
    # Torch and Triton ask the driver for functions that it may lack; of a failed launch our own checks tell.
    "memcheck": ("--report-api-errors", "no"),
}
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_PREFIX = re.compile(r"^=+ ?", re.MULTILINE)


def cells(options: Options) -> Sequence[Cell]:
    """Every kernel under one tool, then under the next: a run that is cut off has seen all with the first ones."""
    assert ops.__all__  # importing the package registers the ops
    pairs = [
        (op, name) for op in registry.ops() for name in kernels.names(op, options.device) if name in IMPLEMENTATIONS
    ]
    tools = (None,) if options.dry_run else TOOLS
    return [
        Cell(f"{tool or 'no tool'} {op} {name}", partial(check, tool, op, name)) for tool in tools for op, name in pairs
    ]


def check(tool: str | None, op: str, name: str, context: Context) -> dict[str, Any]:
    program = find() if tool else None
    if tool and program is None:
        raise Skip(f"no {PROGRAM} in PATH, $CUDA_HOME/bin, nor from pip (nvidia-cuda-sanitizer-api)")
    if context.servers is not None and not context.options.dry_run:
        context.servers.stop()  # a tool's tables take the memory that a server would hold
    folder = context.options.out / "sanitizer"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{tool or 'no-tool'}-{op}-{name}"
    result, log, output = (stem.with_suffix(suffix) for suffix in (".json", ".log", ".out"))
    for old in (result, log, output):
        old.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu.sanitized", op, name, "--out", str(result.resolve())]
    if program and tool:
        command = [program, "--tool", tool, *OPTIONS, *_options(tool), "--log-file", str(log.resolve()), *command]
    else:
        command.append("--dry-run")
    code = _run(command, output, context.options.dry_run)
    return {"tool": tool, **_judged(tool, code, _read(log), _read(output), _values(result))}


def find() -> str | None:
    """The program that is to be run: of PATH, of CUDA_HOME, of NVIDIA's package for pip."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if home := os.environ.get("CUDA_HOME"):
        folders.append(str(Path(home) / "bin"))
    return shutil.which(PROGRAM, path=os.pathsep.join([*folders, *pip_folders()]))


def pip_folders() -> list[str]:
    package = find_spec("nvidia")
    places = [] if package is None else package.submodule_search_locations or []
    return [str(folder) for place in places for folder in sorted(Path(place).glob("*/bin"))]


def _options(tool: str) -> tuple[str, ...]:
    excluded = () if tool == "initcheck" else FOREIGN_SYMBOLS
    names = [text for symbol in excluded for text in ("--kernel-name-exclude", f"kns={symbol}")]
    return (*TOOL_OPTIONS.get(tool, ()), *names)


def _run(command: Sequence[str], output: Path, dry_run: bool) -> int:
    """The exit code. Raises CellError where there is none in time; then nothing of it runs on."""
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent / "test"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if dry_run:
        environment["TRITON_INTERPRET"] = "1"
    with output.open("w", encoding="utf-8") as file:
        # A session of its own: the program starts others, which have to end with it.
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            return process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise CellError(f"did not end within {SECONDS:.0f} s: its processes were ended") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _judged(tool: str | None, code: int, report: str, output: str, values: dict[str, Any] | None) -> dict[str, Any]:
    """What the cell records. Raises Skip and CellError."""
    found = code == FOUND or any(int(count) for count in _SUMMARY.findall(report))
    foreign = found and tool == "initcheck" and _all_foreign(report)
    lines = [line for line in _PREFIX.sub("", report).splitlines() if line.strip()][1:]
    if found and not foreign:
        first = lines[0].strip() if lines else "a finding without a report"
        return {"passed": False, "shown": f"{tool}: {first}", "report": lines[:REPORT_LINES], "cases": values}
    if values is not None and "skip" in values:
        raise Skip(values["skip"])
    if values is None and lines and not output.strip() and not _SUMMARY.search(report):
        # Its process never came to say a word, nor the tool to sum up: containers and old drivers do that.
        raise Skip(f"{PROGRAM} does not run here: {shortened(' '.join(lines))}")
    if values is None or code not in (0, FOUND):
        raise CellError(shortened(f"{report}\n{output}".strip()) or f"ended with exit code {code} and said nothing")
    said = f"{tool}: no findings" if tool else "without a tool"
    if foreign:
        said += " but in kernels of torch's libraries"
    return {**values, "shown": f"{said}; {values['shown']}"}


def _all_foreign(report: str) -> bool:
    """Whether every finding names a kernel of torch's or its libraries'; not where some were not printed."""
    found = re.split(r"^=+ (?=\S)", report, flags=re.MULTILINE)
    findings = [block for block in found if re.search(r"^=+ +at ", block, re.MULTILINE)]
    counts = [int(count) for count in _SUMMARY.findall(report)]
    return bool(findings) and counts == [len(findings)] and all(FOREIGN.search(block) for block in findings)


def _values(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


SECTION = Section("sanitizer", cells)
