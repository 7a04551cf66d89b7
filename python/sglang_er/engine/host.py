"""What this machine is, and the name under which our CPU platform is selected. Imports no SGLang."""

from __future__ import annotations

import importlib.metadata
import os
import platform

PLATFORM_NAME = "sglang_er_cpu"
PLATFORM_CLASS = "sglang_er.engine.cpu.platform.CpuPlatform"
_PLATFORM_GROUP = "sglang.srt.platforms"
# Rounds that an OpenMP thread spins before it sleeps (.4 ms), in place of 300,000 (10 ms): a thread that shares its
# core with the one that it waits for spins in vain. docs/configuration.md has the measurement.
SPIN_COUNT = "10000"


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def accelerator_present() -> bool:
    import torch

    npu = getattr(torch, "npu", None)
    return torch.cuda.is_available() or torch.xpu.is_available() or (npu is not None and npu.is_available())


def cpu_platform_wanted() -> bool:
    """True when SGLANG_PLATFORM selects our platform, or when nothing is selected, no accelerator is present, no
    other platform plugin is installed and SGLang's own CPU engine (which needs AMX) was not asked for."""
    if not is_x86():
        return False
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected:
        return selected == PLATFORM_NAME
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or accelerator_present():
        return False
    return all(ep.name == PLATFORM_NAME for ep in importlib.metadata.entry_points(group=_PLATFORM_GROUP))


def spin_briefly() -> None:
    """For processes that load the OpenMP runtime (with torch) after this; a choice of the user's stands."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
