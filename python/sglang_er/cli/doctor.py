"""`sglang-er doctor`: what this machine and this installation are, and every problem found, with what to do."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang_er import __version__, config
from sglang_er.cli.common import cache_dir

# A Qwen3-0.6B shape with its twin and the default KV pool takes about this much.
LEAST_MEMORY = 5 << 30
# About a second.
BANDWIDTH_REPEATS = 9


@dataclass
class Findings:
    """`facts`: label -> value, in the order of printing. `problems` set the exit code, `advice` does not."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def text(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {_shown(value)}" for name, value in self.facts.items()]
        lines += ["", *(f"problem: {line}" for line in self.problems), *(f"advice: {line}" for line in self.advice)]
        return "\n".join([*lines, *([] if self.problems else ["no problem found"])])


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")


def run(args: argparse.Namespace) -> int:
    """0 without a problem, else 1."""
    from sglang_er.engine import host

    findings = Findings()
    check_variables(findings)
    host.spin_briefly()  # before torch is imported, and after the user's own choice was looked at
    for check in CHECKS:
        try:
            check(findings)
        except ImportError as error:
            line = f"{error.name or 'a package'} cannot be imported ({str(error).splitlines()[0]}): run 'make setup'"
            if line not in findings.problems:
                findings.problems.append(line)
    if args.json:
        print(json.dumps({"facts": findings.facts, "problems": findings.problems, "advice": findings.advice}, indent=1))
    else:
        print(findings.text())
    return 1 if findings.problems else 0


def check_versions(found: Findings) -> None:
    from sglang_er.engine import compat

    found.facts["sglang-er"] = __version__
    found.facts["Python"] = platform.python_version()
    try:
        compat.require_supported_version()
        found.facts["SGLang"] = f"{compat.installed_sglang()} (supported)"
    except compat.UnsupportedSGLang as error:
        found.facts["SGLang"] = f"{compat.installed_sglang()} (NOT supported)"
        found.problems.append(str(error))
    import torch

    found.facts["torch"] = torch.__version__


def check_configuration(found: Findings) -> None:
    try:
        resolved = config.from_env()
    except config.ConfigError as error:
        found.problems += str(error).splitlines()
        return
    chosen = {name: source for name, source in resolved.set_by().items() if source != "default"}
    found.facts["configuration"] = [
        f"{name}={getattr(resolved, name)} ({chosen[name]})" for name in chosen
    ] or "defaults"


def check_platform(found: Findings) -> None:
    from sglang_er.engine import host

    if host.accelerator_present():
        found.facts["platform"] = "SGLang's own, for the accelerator"
    elif host.cpu_platform_wanted():
        found.facts["platform"] = f"{host.PLATFORM_NAME} (ours, for CPUs)"
    elif not host.is_x86():
        found.facts["platform"] = f"none for {platform.machine()}"
        found.problems.append("neither an accelerator nor an x86-64 CPU: no platform here can serve a model")
    else:
        chosen = os.environ.get("SGLANG_PLATFORM")
        found.facts["platform"] = chosen or "SGLang's own choice"
        found.advice.append(
            f"SGLANG_PLATFORM, SGLANG_USE_CPU_ENGINE or another plugin keeps our CPU platform out; "
            f"`sglang-er serve` needs SGLANG_PLATFORM={host.PLATFORM_NAME} here"
        )


def check_cores(found: Findings) -> None:
    from sglang_er.rollout import cores, machine

    here, allowed, quota = machine.look(), cores.allowed(), cores.quota()
    found.facts["CPU"] = here.cpu
    found.facts["cores"] = f"{len(allowed)} logical, {cores.physical(allowed)} physical, of {os.cpu_count()}"
    found.facts["affinity"] = _ranges(allowed)
    found.facts["CPU quota"] = None if quota is None else f"{quota:g} cores"
    found.facts["load average"] = [round(value, 2) for value in here.load]
    if quota is not None and quota < 1:
        found.advice.append(f"the CPU quota is {quota:g} cores: one thread alone will be stopped again and again")
    if here.load[0] > here.cores / 2:
        found.advice.append(
            f"other programs keep the {here.cores} cores busy (load {here.load[0]:.1f}): figures say little now"
        )


def check_variables(found: Findings) -> None:
    """Variables about threads."""
    from sglang_er.engine import host
    from sglang_er.rollout import cores

    most, counts = len(cores.allowed()), ("SGLANG_ER_CPU_THREADS", "OMP_NUM_THREADS")
    names = [*counts, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND"]
    found.facts["thread variables"] = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)] or None
    for name in counts:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > most:
            found.problems.append(
                f"{name}={value} with {most} cores: threads will wait for each other; unset it, or at most {most}"
            )
    if os.environ.get("OMP_PROC_BIND", "false").lower() not in ("false", ""):
        found.advice.append("OMP_PROC_BIND pins every process of the server to the same first core: unset it")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        found.advice.append(
            "OMP_WAIT_POLICY=active: threads spin without an end, which stalls a busy machine; unset it, "
            f"then `sglang-er serve` sets GOMP_SPINCOUNT={host.SPIN_COUNT}"
        )


def check_threads(found: Findings) -> None:
    import torch

    from sglang_er.rollout import cores

    found.facts["threads"] = f"torch {torch.get_num_threads()}, `sglang-er serve` {cores.default_threads()} by default"


def check_kernels(found: Findings) -> None:
    from sglang_er import kernels

    try:
        found.facts["compiled library"] = f"version {kernels.library_version()}"
        used, available = kernels.isa(), kernels.supported_isas()
    except (kernels.LibraryError, ValueError) as error:
        found.problems.append(str(error))
        return
    found.facts["instruction set"] = f"{used}, of {', '.join(available)}"
    if used == "portable":
        found.advice.append("the portable kernels are in use, several times slower than AVX2 or AVX-512")
    elif forced := os.environ.get("SGLANG_ER_CPU_ISA", "auto").replace("auto", ""):
        found.advice.append(f"SGLANG_ER_CPU_ISA={forced} forces an instruction set: for tests and measurements only")


def check_memory(found: Findings) -> None:
    from sglang_er.rollout import memory

    total, available = memory.total_and_available()
    found.facts["memory"] = f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} available"
    if available < LEAST_MEMORY:
        found.advice.append(
            f"{available / 2**30:.1f} GiB of memory are available; a server on the 0.5b shape takes about "
            f"{LEAST_MEMORY >> 30}: choose a smaller model or --max-total-tokens"
        )
    pages = memory.huge_pages()
    found.facts["transparent huge pages"] = pages
    if pages is not None:
        found.facts["transparent huge pages"] = f"{pages}; the native executor asks for them itself"


def check_bandwidth(found: Findings) -> None:
    from sglang_er.bench import stream, timing
    from sglang_er.rollout import memory

    footprint = min(stream.FOOTPRINT, memory.total_and_available()[1] // 4)
    found.facts["bandwidth"] = stream.Stream(footprint).measure(timing.Timing(BANDWIDTH_REPEATS, calls=3)).text()


def check_cache(found: Findings) -> None:
    folder = cache_dir()
    models = sorted(path.name for path in (folder / "models").glob("*") if (path / "config.json").is_file())
    found.facts["cache"] = f"{folder} ({len(models)} models)"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        found.problems.append(f"{folder} cannot be written: set XDG_CACHE_HOME to a folder that can")


def _ranges(numbers: list[int]) -> str:
    """`0-3,6`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


CHECKS: tuple[Callable[[Findings], None], ...] = (
    check_versions,
    check_configuration,
    check_platform,
    check_cores,
    check_threads,
    check_kernels,
    check_memory,
    check_bandwidth,
    check_cache,
)
