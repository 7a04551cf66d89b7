"""How many variants of each Triton kernel a sweep of calls compiles, counted without a GPU.

    python test/support/launch_keys.py            # TRITON_INTERPRET must not be set

Launches are not made: each one's key into the compiler's cache is made as Triton makes it, for sm_90a, and kept.
Prints {op: {kernel: number of keys}}. Arguments lie as in the engine: views of larger buffers, wherever the number of
rows puts them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.triton.choose_seeded import choose_seeded
from sglang_er.kernels.triton.draft_sample import draft_sample
from sglang_er.kernels.triton.sample_rows import sample_rows
from sglang_er.kernels.triton.softmax_rows import softmax_rows
from sglang_er.kernels.triton.verify_chain import verify_chain
from sglang_er.kernels.triton.w4a8_linear import w4a8_linear
from sglang_er.kernels.triton.w4a16_experts import w4a16_experts
from sglang_er.kernels.triton.w4a16_linear import w4a16_linear

ROWS, GAMMAS = range(1, 17), range(1, 8)
MORE_ROWS = range(17, 130, 7)  # that int8 is for
VOCABULARY = 4096


class Keys:
    """In the place of a launch."""

    def __init__(self) -> None:
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[JITFunction, Any] = {}
        self.of: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.op = ""

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = kernel.__name__
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        _, specialization, options = self._binders[kernel](*args, **kwargs)
        self.of[self.op][name].add(compute_cache_key({}, specialization, options))


def part(dtype: torch.dtype, first: int, *shape: int) -> torch.Tensor:
    """Of a larger buffer, from its element `first` on."""
    size = int(torch.Size(shape).numel())
    return torch.zeros(first + size, dtype=dtype)[first:].view(shape)


def sweep(keys: Keys) -> None:
    hidden, inner, count, choices = 256, 128, 16, 4
    gate_up = PackedWeight.empty(count * 2 * inner, hidden, 128)
    down = PackedWeight.empty(count * hidden, inner, 128)
    for rows in ROWS:
        logits, out = torch.zeros(rows, VOCABULARY), torch.zeros(rows, VOCABULARY)
        temperatures, coins, tokens, accepted = (
            part(dtype, rows, rows) for dtype in (torch.float32, torch.float64, torch.int64, torch.int32)
        )
        filters = part(torch.int32, rows, rows), part(torch.float32, rows, rows), part(torch.float32, 2 * rows, rows)
        keys.op = "softmax_rows"
        softmax_rows(logits, temperatures, out)
        keys.op = "draft_sample"
        draft_sample(logits, temperatures, *filters, coins, tokens, out)
        keys.op = "choose_seeded"
        choose_seeded(logits, temperatures, tokens, tokens, tokens)
        keys.op = "sample_rows"
        sample_rows(logits, None, None, coins, tokens)
        for gamma in GAMMAS:
            p, q = torch.zeros(rows, gamma + 1, VOCABULARY), torch.zeros(gamma, rows, VOCABULARY).transpose(0, 1)
            keys.op = "sample_rows"
            sample_rows(p, q, tokens, coins, tokens)
            keys.op = "verify_chain"
            drafts, chain = part(torch.int64, rows, rows, gamma), part(torch.int64, rows, rows, gamma + 1)
            verify_chain(p, q, drafts, part(torch.float64, rows, rows, gamma), coins, chain, accepted)
        x, mixed = torch.zeros(rows, hidden).bfloat16(), torch.zeros(rows, hidden).bfloat16()
        keys.op = "w4a16_experts"
        experts, weights = part(torch.int32, rows, rows, choices), part(torch.float32, rows, rows, choices)
        w4a16_experts(x, gate_up, down, experts, weights, mixed)
        keys.op = "w4a16_linear"
        w4a16_linear(x, gate_up.rows(0, 2 * inner), None, x.new_empty(rows, 2 * inner))

    keys.op = "w4a8_linear"
    for rows in (*ROWS, *MORE_ROWS):
        x = torch.zeros(rows, hidden).bfloat16()
        w4a8_linear(x, gate_up.rows(0, 2 * inner), None, x.new_empty(rows, 2 * inner))


def main() -> None:
    keys = Keys()
    JITFunction.run = lambda kernel, *args, **kwargs: keys.launch(kernel, *args, **kwargs)  # type: ignore[method-assign]
    sweep(keys)
    print(json.dumps({op: {name: len(found) for name, found in kernels.items()} for op, kernels in keys.of.items()}))


if __name__ == "__main__":
    main()
