"""Gaps between the kernels of a trace."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from gpu import trace


def event(name: str, begin: float, duration: float, category: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "pid": 0, "tid": 7}


EVENTS = [
    event("gemm", 100, 10),
    event("copy", 105, 20, "gpu_memcpy"),  # beside the gemm, to 125
    event("add", 107, 2),  # within both
    event("softmax", 131, 4),  # 6 us after the copy
    event("gemm", 135, 5),  # at once
    event("aten::mm", 0, 1000, "cpu_op"),
    event("cudaLaunchKernel", 90, 3, "cuda_runtime"),
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


def test_gaps_are_the_time_in_which_nothing_runs():
    found = trace.gaps(EVENTS)
    assert found["launches"] == 5
    assert (found["span_us"], found["busy_us"], found["idle_us"]) == (40, 34, 6)
    assert found["idle_share"] == pytest.approx(6 / 40)
    assert found["largest_gaps"] == [{"us": 6, "after": "copy", "before": "softmax"}]
    assert list(found["busiest"].items())[:2] == [("copy", 20), ("gemm", 15)]


def test_the_order_of_the_events_does_not_matter():
    assert trace.gaps(EVENTS[::-1]) == trace.gaps(EVENTS)


def test_a_trace_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no work"):
        trace.gaps([event("aten::mm", 0, 5, "cpu_op")])
    assert trace.gaps([event("aten::mm", 0, 5, "cpu_op")], trace.CPU_CATEGORIES)["idle_share"] == 0


def test_packed_traces_are_read_and_unfinished_ones_are_errors(tmp_path: Path):
    packed = tmp_path / "a.trace.json.gz"
    packed.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    assert trace.load(packed) == EVENTS
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises((ValueError, EOFError, OSError)):
        trace.load(packed)
    plain = tmp_path / "b.json"
    plain.write_text(json.dumps({"traceEvents": EVENTS}))
    assert trace.load(plain) == EVENTS
