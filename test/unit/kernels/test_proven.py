"""docs/gpu-status.md and the program agree on what was seen correct on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_er.kernels import proven, registry

PAGE = (Path(__file__).parents[3] / "docs/gpu-status.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (cuda|triton|marlin) \| (.*) \|$", PAGE, flags=re.MULTILINE)


def test_every_gpu_kernel_has_a_line():
    known = {
        (op, entry.name) for op in registry.ops() for entry in registry.implementations(op) if entry.name in proven.GPU
    }
    assert {(op, name) for op, name, _ in ROWS} == known


def test_proven_is_what_the_page_calls_correct():
    said = {(op, name) for op, name, state in ROWS if re.search(r"(correct|measured) on H\d00 \(\d{4}-", state)}
    assert said == proven.KERNELS
