"""The CPU attention backend against dense attention in float64, over a real paged KV pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_er.engine.cpu import executor
from sglang_er.engine.cpu.attention import CpuAttentionBackend

HEAD_DIM = 16
ROWS, ROW_WIDTH = 8, 96


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that the backend has."""
    monkeypatch.setattr(executor, "own_kernels", request.param == "kernel")


class _Pool:
    """Slot-indexed K and V buffers; poisoned, so that reading a slot nobody wrote shows."""

    def __init__(self, slots: int, kv_heads: int) -> None:
        self.keys = torch.full((slots, kv_heads, HEAD_DIM), float("nan"))
        self.values = torch.full((slots, kv_heads, HEAD_DIM), float("nan"))

    def set_kv_buffer(self, layer: Any, location: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.keys[location.loc] = k.view(-1, *self.keys.shape[1:])
        self.values[location.loc] = v.view(-1, *self.values.shape[1:])

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values


class _World:
    """Requests with full K and V of every position, and the backend that must find them through the page table."""

    def __init__(self, heads: int, kv_heads: int, window: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.kv_heads = kv_heads
        self.table = (torch.randperm(ROWS * ROW_WIDTH) + 1).view(ROWS, ROW_WIDTH).to(torch.int32)
        self.pool = _Pool(ROWS * ROW_WIDTH + 1, kv_heads)
        self.k = torch.randn(ROWS, ROW_WIDTH, kv_heads, HEAD_DIM)
        self.v = torch.randn(ROWS, ROW_WIDTH, kv_heads, HEAD_DIM)
        self.q = torch.randn(ROWS, ROW_WIDTH, heads, HEAD_DIM)
        self.layer = SimpleNamespace(
            layer_id=0,
            tp_q_head_num=heads,
            tp_k_head_num=kv_heads,
            qk_head_dim=HEAD_DIM,
            v_head_dim=HEAD_DIM,
            scaling=HEAD_DIM**-0.5,
            is_cross_attention=False,
            attn_type=AttentionType.DECODER,
            sliding_window_size=window,
        )
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=self.table), token_to_kv_pool=self.pool
        )
        self.backend = CpuAttentionBackend(runner)  # type: ignore[arg-type]

    def store(self, row: int, upto: int) -> None:
        slots = self.table[row, :upto].long()
        self.pool.keys[slots], self.pool.values[slots] = self.k[row, :upto], self.v[row, :upto]

    def expected(self, row: int, position: int) -> torch.Tensor:
        """float64 [heads, dim]: attention of the query at `position` over positions 0..position (or the window)."""
        first = 0 if self.layer.sliding_window_size < 0 else max(0, position - self.layer.sliding_window_size)
        group = self.layer.tp_q_head_num // self.kv_heads
        keys = self.k[row, first : position + 1].double().repeat_interleave(group, dim=1)
        values = self.v[row, first : position + 1].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,lhd->hl", self.q[row, position].double(), keys) * self.layer.scaling
        return torch.einsum("hl,lhd->hd", scores.softmax(-1), values)

    def run(self, batch: Any, rows: list[int], spans: list[tuple[int, int]], method: str) -> torch.Tensor:
        gather = lambda source: torch.cat([source[r, a:b].flatten(1) for r, (a, b) in zip(rows, spans)])  # noqa: E731
        batch.out_cache_loc = torch.cat([self.table[r, a:b].long() for r, (a, b) in zip(rows, spans)])
        self.backend.init_forward_metadata(batch)
        forward = getattr(self.backend, method)
        out = forward(gather(self.q), gather(self.k), gather(self.v), self.layer, batch)
        return out.view(-1, self.layer.tp_q_head_num, HEAD_DIM)

    def check(self, out: torch.Tensor, rows: list[int], spans: list[tuple[int, int]]) -> None:
        wanted = torch.stack([self.expected(r, p) for r, (a, b) in zip(rows, spans) for p in range(a, b)])
        torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)


HEADS = [(4, 4), (4, 2), (6, 1)]
WINDOWS = [-1, 7]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lens", [[5], [5, 33, 1], [20, 20]])
def test_decode(heads: tuple[int, int], window: int, lens: list[int]) -> None:
    """One query per request; lens = committed tokens, the query's own included."""
    world, rows = _World(*heads, window), [3, 0, 6][: len(lens)]
    for row, length in zip(rows, lens):
        world.store(row, length - 1)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(lens),
        spec_info=None,
    )
    spans = [(length - 1, length) for length in lens]
    world.check(world.run(batch, rows, spans, "forward_decode"), rows, spans)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("width", [2, 8])
def test_verify(heads: tuple[int, int], window: int, width: int) -> None:
    """gamma + 1 queries per request behind a committed prefix; each sees the prefix and the chain up to itself."""
    world, rows, committed = _World(*heads, window), [2, 7, 4], [1, 40, 13]
    for row, length in zip(rows, committed):
        world.store(row, length)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(committed),
        spec_info=SimpleNamespace(num_tokens_per_req=width),
    )
    spans = [(length, length + width) for length in committed]
    world.check(world.run(batch, rows, spans, "forward_extend"), rows, spans)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_extend_with_and_without_a_prefix(heads: tuple[int, int], window: int) -> None:
    """Prefill of whole prompts, of a chunk behind a cached prefix, and of an empty chunk in one batch."""
    world, rows = _World(*heads, window), [1, 5, 0]
    prefixes, new = [0, 17, 4], [30, 9, 0]
    for row, prefix in zip(rows, prefixes):
        world.store(row, prefix)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        req_pool_indices=torch.tensor(rows),
        extend_prefix_lens=torch.tensor(prefixes),
        extend_seq_lens=torch.tensor(new),
        spec_info=None,
    )
    spans = [(prefix, prefix + count) for prefix, count in zip(prefixes, new)]
    world.check(world.run(batch, rows, spans, "forward_extend"), rows, spans)
