"""Every Triton kernel compiles for the GPUs that it is meant for; what it computes is tested under the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts/compile_triton.py"


def compiled(*arguments: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_one_of_each_kernel_for_sm_90a():
    lines = compiled()
    assert len(lines) >= 16
    assert all(re.search(r"REG:\d+ STACK:\d+ SHARED:\d+", line) for line in lines), lines


@pytest.mark.full
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_specialization(arch: str):
    assert len(compiled("--all", "--arch", arch)) > 100


@pytest.mark.full
def test_products_fit_into_the_shared_memory_of_small_gpus():
    assert len(compiled("--all", "--arch", "120", "--ops", "w4a16_linear,w4a8_linear,w4a16_experts")) > 40
