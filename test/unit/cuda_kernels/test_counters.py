"""Whose counters a launch of a split sum takes: what may run at the same time never shares them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.cuda import loader, w4_linear, w4a8_linear, w4a16_linear
from sglang_er.kernels.cuda.counters import Counters

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Made:
    """Makes counters on the CPU, and remembers for which devices."""

    def __init__(self) -> None:
        self.devices: list[torch.device] = []

    def __call__(self, device: torch.device) -> torch.Tensor:
        self.devices.append(device)
        return torch.zeros(8, dtype=torch.int32)


def test_work_that_may_overlap_has_counters_of_its_own():
    """Another device, another stream, another capture, or a launch beside a capture on the same stream."""
    made = Made()
    counters = Counters(made)
    places = [(device, stream, capture) for device in (FIRST, SECOND) for stream in (0, 7) for capture in (0, 3, 4)]
    sets = [counters.of(*place) for place in places]
    assert len({one.data_ptr() for one in sets}) == len(places)
    assert made.devices == [place[0] for place in places]


def test_work_of_one_stream_shares_them_for_as_long_as_it_comes():
    made = Made()
    counters = Counters(made, most=2)
    kept = counters.of(FIRST, 7, 0)
    for capture in range(1, 50):
        counters.of(FIRST, 7, capture)
        assert counters.of(FIRST, 7, 0) is kept
    assert len(made.devices) == 50


def test_sets_that_nobody_uses_are_let_go():
    counters = Counters(Made(), most=4)
    for capture in range(100):
        counters.of(FIRST, 7, capture)
    assert len(counters._sets) == 4
    assert [capture for _, _, capture in counters._sets] == [96, 97, 98, 99]


class Library:
    """In place of the compiled one: keeps what it is called with; the test says what is captured."""

    def __init__(self) -> None:
        self.capture = 0
        self.counters: list[torch.Tensor] = []

    def capture_id(self, x: torch.Tensor) -> int:
        return self.capture

    def partial_values(self, rows: int, cols: int, m: int) -> int:
        return 100 * rows + cols + m

    def workspace_counters(self) -> int:
        return 8

    def level_groups(self, cols: int) -> int:
        return cols // 128

    def w4a8_linear(self, *arguments: object) -> None:
        levels, numbers = arguments[-4:-2]
        assert isinstance(levels, torch.Tensor) and levels.dtype == torch.int8 and levels.shape == (3, 2, 128)
        assert isinstance(numbers, torch.Tensor) and numbers.dtype == torch.float32 and numbers.shape == (3, 2, 2)
        self.w4a16_linear(*arguments)

    def w4a16_linear(self, *arguments: object) -> None:
        partials, counters = arguments[-2:]
        assert isinstance(partials, torch.Tensor) and partials.dtype == torch.float32 and partials.numel() == 5059
        assert isinstance(counters, torch.Tensor) and counters.dtype == torch.int32 and not counters.any()
        self.counters.append(counters)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Tensors are a CPU's: what a GPU's wrapper asks torch for is answered here."""
    library = Library()
    monkeypatch.setattr(w4_linear, "serves", lambda *_: True)
    monkeypatch.setattr(loader, "module", lambda name, device: library)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: library.capture > 0)
    w4_linear._loaded.cache_clear()
    yield library
    w4_linear._loaded.cache_clear()


@pytest.mark.parametrize("linear", [w4a16_linear.w4a16_linear, w4a8_linear.w4a8_linear])
def test_a_call_takes_those_of_its_stream_or_capture(linear, library: Library, monkeypatch: pytest.MonkeyPatch):
    x, weight, out = torch.zeros(3, 256).bfloat16(), PackedWeight.empty(48, 256, 128), torch.zeros(3, 48).bfloat16()
    for stream, capture in ((1, 0), (2, 0), (1, 5), (2, 5), (1, 5), (1, 6), (1, 0)):
        library.capture = capture
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, at=stream: SimpleNamespace(cuda_stream=at))
        linear(x, weight, None, out)
    first, second, captured, beside, again, other, back = (counters.data_ptr() for counters in library.counters)
    assert len({first, second, captured, beside, other}) == 5
    assert again == captured and back == first


def test_a_first_call_inside_a_capture_says_what_to_do(library: Library):
    library.capture = 5
    x, weight, out = torch.zeros(3, 256).bfloat16(), PackedWeight.empty(48, 256, 128), torch.zeros(3, 48).bfloat16()
    with pytest.raises(RuntimeError, match="call it once before a CUDA graph is captured"):
        w4a16_linear.w4a16_linear(x, weight, None, out)
