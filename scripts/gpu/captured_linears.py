"""Products within a CUDA graph, whose launches may begin while the ones before them end: two in a row, the second of
which takes what the first one gives, behind a copy that writes the first one's x. On a device without graphs they are
called instead of replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_er import kernels

from .kernel_makers import REFERENCE, TOLERANCE, Draw, Guarded, Prepared

INPUTS = 3
REPLAYS = 8  # of each input


def w4_linears(op: str, m: int, n: int, k: int, group: int, dtype: torch.dtype, draw: Draw) -> Prepared:
    """x [m, k] -> [m, n] -> [m, k]; the largest error of all replays and of both products."""
    function = getattr(kernels, op)
    # The second product's inputs have a size that fp16 holds.
    first, second = (
        kernels.quantize_pack(draw.weight(*shape).mul_(shape[1] ** -0.5), group, implementation=REFERENCE)
        for shape in ((n, k), (k, n))
    )
    sources = [draw.normal(m, k, dtype=dtype) for _ in range(INPUTS)]
    staged, x = torch.empty_like(sources[0]), torch.empty_like(sources[0])
    inner, outer = (Guarded(m, size, dtype, draw.device) for size in (n, k))
    errors: list[float] = []

    def step(implementation: str) -> None:
        outer.poison()
        given = inner.poison()
        x.copy_(staged)
        function(x, first, None, given, implementation=implementation)
        function(given, second, None, outer.out, implementation=implementation)

    def call(implementation: str) -> None:
        errors.clear()
        staged.copy_(sources[0])
        replay = _recorded(lambda: step(implementation), draw.device)
        for turn in range(INPUTS * REPLAYS if draw.device == "cuda" else INPUTS):
            source = sources[turn % INPUTS]
            staged.copy_(source)
            replay()
            for guarded, given, weight in ((inner, source, first), (outer, inner.out, second)):
                errors.append(guarded.error(function(given.double(), weight, None, implementation=REFERENCE)))

    return Prepared(call, lambda: max(errors, key=lambda error: (error != error, error)), TOLERANCE[dtype])


def _recorded(step: Callable[[], None], device: str) -> Callable[[], object]:
    step()
    if device != "cuda":
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # makes the counters of this capture, between its copy of x and the first product
        step()
    return graph.replay
