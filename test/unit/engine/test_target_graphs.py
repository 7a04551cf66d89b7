"""Which graphs a target forward is bound to, with recording pretended: the rest is SGLang's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_er.engine.target_graphs import MOST_ROWS, Recorded, TargetGraphs, bound

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def make(
    memory_per_width: int = 0, budget: tuple[int, float] = (1 << 30, 60.0), **options: Any
) -> tuple[TargetGraphs, SimpleNamespace]:
    runner = SimpleNamespace(attn_backend="own", decode_cuda_graph_runner="plain", captured={})

    def capture(width: int, sizes: list[int]) -> Recorded:
        runner.captured[width] = sizes
        return Recorded(f"attention {width}", f"graphs {width}")

    return TargetGraphs(runner, capture, lambda: memory_per_width * len(runner.captured), budget, **options), runner


def seen(runner: SimpleNamespace) -> tuple[object, object]:
    return runner.attn_backend, runner.decode_cuda_graph_runner


def test_every_width_gets_its_own_graphs_and_attention():
    graphs, runner = make()
    graphs.record(7, SIZES)
    assert sorted(runner.captured) == [2, 3, 4, 5, 6, 7, 8]
    for width in range(2, 9):
        with graphs.verifying(width, 3):
            assert seen(runner) == (f"attention {width}", f"graphs {width}")
        assert seen(runner) == ("own", "plain")
    assert graphs.describe()["verify_recorded"] == 7


def test_wide_passes_of_large_batches_are_not_recorded():
    graphs, runner = make()
    graphs.record(7, SIZES)
    assert max(runner.captured[2]) == 256 and max(runner.captured[8]) == 64
    assert all(size * width <= MOST_ROWS for width, sizes in runner.captured.items() for size in sizes)
    with graphs.verifying(8, 65):
        assert seen(runner) == ("attention 8", None)
    assert graphs.describe()["verify_eager"] == 1


@pytest.mark.parametrize("budget", [(150, 60.0), (1 << 30, -1.0)])
def test_recording_ends_with_memory_or_time(budget: tuple[int, float]):
    """What is missing runs without graphs, never in those of another width."""
    graphs, runner = make(memory_per_width=100, budget=budget)
    graphs.record(7, SIZES)
    assert sorted(runner.captured) == ([2, 4] if budget[0] == 150 else [4])
    with graphs.verifying(8, 1):
        assert seen(runner) == ("own", None)


def test_a_large_gamma_max_is_recorded_whole():
    graphs, runner = make()
    graphs.record(9, SIZES)
    assert sorted(runner.captured) == list(range(2, 11))


def test_without_graphs_nothing_is_touched():
    runner = SimpleNamespace()
    graphs = TargetGraphs(runner)
    graphs.record(7, SIZES)
    with graphs.verifying(4, 1):
        assert vars(runner) == {}
    assert graphs.describe() is None and graphs.attentions == ()


def test_passes_without_a_graph_have_the_attention_of_their_width():
    """Where the runner's own knows another one. Made once, at first use."""
    runner, made = SimpleNamespace(attn_backend="own", decode_cuda_graph_runner=None), []
    graphs = TargetGraphs(runner, attention=lambda width: made.append(width) or f"attention {width}")
    graphs.record(7, SIZES)
    for width in (3, 8, 3):
        with graphs.verifying(width, 4):
            assert seen(runner) == (f"attention {width}", None)
        assert seen(runner) == ("own", None)
    assert made == [3, 8] and graphs.attentions == ("attention 3", "attention 8") and graphs.describe() is None


def test_a_width_that_was_not_recorded_has_one_too():
    graphs, runner = make(100, (150, 60.0), attention=lambda width: f"unrecorded {width}")
    graphs.record(7, SIZES)
    with graphs.verifying(2, 1):
        assert seen(runner) == ("attention 2", "graphs 2")
    with graphs.verifying(8, 1):
        assert seen(runner) == ("unrecorded 8", None)


def test_an_error_inside_leaves_the_runner_as_it_was():
    graphs, runner = make()
    graphs.record(3, SIZES)
    with pytest.raises(RuntimeError), graphs.verifying(4, 1):
        raise RuntimeError
    with pytest.raises(RuntimeError), bound(runner, None, None):
        assert seen(runner) == ("own", None)
        raise RuntimeError
    assert seen(runner) == ("own", "plain")
