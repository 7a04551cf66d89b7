"""The machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """`cores`: those that this process may use. `load`: load averages over 1, 5 and 15 minutes."""

    cpu: str
    cores: int
    load: tuple[float, float, float]

    def text(self) -> str:
        return f"{self.cpu}, {self.cores} cores, load average " + " ".join(f"{value:.1f}" for value in self.load)


def look() -> Machine:
    """This machine, now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(_cpu_model(), cores, os.getloadavg())


def fair_threads(machine: Machine) -> int | None:
    """Threads for arithmetic on a machine that others keep busy: a fair share of its cores. None: no need to hold back.

    Threads meet after every layer; where one of them has to wait for a core, all wait, hundreds of times a step.
    """
    if machine.load[0] <= machine.cores + 1:
        return None
    return max(1, round(machine.cores**2 / (machine.cores + machine.load[0])))


def session_cpu_seconds(session: int, proc: Path = Path("/proc")) -> float:
    """Processor time that the processes of a session have used so far; those that have ended are not counted."""
    ticks = 0
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold spaces: count fields from behind it.
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The kernel's name for the CPU; virtual machines often hide the exact model, then family and model are added."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = " ".join(fields.get("model name", platform.processor() or platform.machine()).split())
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name
