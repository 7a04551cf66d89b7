"""Marlin's calls follow each other, whatever streams and threads they come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

from sglang_er.kernels import quantize_pack
from sglang_er.kernels.marlin import loader
from sglang_er.kernels.marlin import w4a16_linear as binding
from sglang_er.kernels.marlin.workspace import Workspace


class Streams:
    """In the place of torch.cuda's: who waits for whom, and which stream records a graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.capturing = 1, set[int]()
        self.waits: list[tuple[int, int]] = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.named(self.current))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current in self.capturing)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    def named(self, handle: int) -> SimpleNamespace:
        wait = lambda other: self.waits.append((handle, other.cuda_stream))  # noqa: E731
        return SimpleNamespace(cuda_stream=handle, wait_stream=wait)

    @contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.cuda_stream
        yield
        self.current = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


@pytest.fixture
def workspace() -> Workspace:
    return Workspace(torch.zeros(1), torch.zeros(1, dtype=torch.int32))


def launch(workspace: Workspace, streams: Streams, stream: int) -> None:
    streams.current = stream
    with workspace.turn(torch.device("cuda", 0)):
        assert streams.current == stream


def test_launches_of_one_stream_wait_for_nothing_else(workspace, streams):
    for _ in range(3):
        launch(workspace, streams, 1)
    assert not streams.waits


def test_a_launch_of_another_stream_comes_behind_all_of_the_last_one(workspace, streams):
    """Start-up, the warm-up of a graph beside it, and the stream that a server computes on from then on."""
    for stream in (1, 2, 2, 1, 3, 3):
        launch(workspace, streams, stream)
    assert streams.waits == [(2, 1), (1, 2), (3, 1)]


def test_what_a_graph_records_waits_for_nothing_and_is_no_launch(workspace, streams):
    launch(workspace, streams, 1)
    streams.capturing = {7}
    launch(workspace, streams, 7)
    launch(workspace, streams, 1)
    assert not streams.waits


def test_a_launch_that_would_join_a_recording_is_refused(workspace, streams):
    launch(workspace, streams, 1)
    streams.capturing = {1}
    with pytest.raises(RuntimeError, match=r"must not overlap.*call it after the recording") as raised:
        launch(workspace, streams, 2)
    assert "\n" not in str(raised.value) and not streams.waits
    streams.capturing = set()
    launch(workspace, streams, 2)
    assert streams.waits == [(2, 1)]


def test_launches_of_two_threads_take_turns(workspace, streams):
    """A launch is made before another one may choose whom to wait for."""
    order: list[str] = []
    inside, device = Event(), torch.device("cuda", 0)

    def second() -> None:
        inside.wait(10)
        with workspace.turn(device):
            order.append("second")

    thread = Thread(target=second)
    thread.start()
    with workspace.turn(device):
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_every_launch_takes_its_turn_with_the_workspace(streams, monkeypatch, generator):
    """The tensors are a CPU's; the kernel's arguments are looked at and nothing is computed."""
    calls = []
    module = SimpleNamespace(gptq_marlin_gemm=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(loader, "module", lambda dtype: module)
    monkeypatch.setattr(binding, "serves", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    binding._prepared.cache_clear()
    packed = quantize_pack(torch.randn(64, 256, generator=generator).bfloat16(), 128, implementation="marlin")
    x = torch.randn(2, 256).bfloat16()
    for streams.current in (1, 2):
        binding.w4a16_linear(x, packed, None, x.new_empty(2, 64))
    binding._prepared.cache_clear()
    assert streams.waits == [(2, 1)]
    first, second = ((arguments[8], arguments[10]) for arguments in calls)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert first[0].numel() == 3 * 64 * 256 and not first[1].any()
