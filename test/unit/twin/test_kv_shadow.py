"""The shadow's flags: what a draft pass may read from it, and who takes that back."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_er.engine.pool_watch import FORWARDS, OTHERS, watch_pool
from sglang_er.twin.kv_shadow import EXACT_NEWEST, ShadowPool

SLOTS, HEADS, DIM, LAYERS = 200, 2, 32, 3


class Pool:
    """The methods of SGLang's MHA pool that write, on plain tensors."""

    def __init__(self) -> None:
        self.k_buffer = [torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)]
        self.v_buffer = [torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)]

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v):
        self.k_buffer[layer][loc_info.loc] = cache_k
        self.v_buffer[layer][loc_info.loc] = cache_v

    def move_kv_cache(self, tgt_loc, src_loc):
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer[tgt_loc] = buffer[src_loc]

    def load_cpu_copy(self, kv_cache_cpu, indices):
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer[indices] = kv_cache_cpu


@pytest.fixture
def shadow() -> tuple[Pool, ShadowPool]:
    pool = Pool()
    return pool, ShadowPool(pool.k_buffer, pool.v_buffer, watch_pool(pool, FORWARDS | OTHERS), "int8")


def refresh(shadow: ShadowPool, *committed: int) -> torch.Tensor:
    """Requests in disjoint, descending slots; returns the table."""
    table = torch.stack([SLOTS - 1 - 90 * row - torch.arange(90) for row in range(len(committed))]).int()
    shadow.refresh(table, torch.arange(len(committed)), torch.tensor(committed))
    return table


def test_old_tokens_become_valid_and_new_ones_do_not(shadow):
    table = refresh(shadow[1], 80, EXACT_NEWEST, 3)[:2]
    expected = torch.zeros(SLOTS, dtype=torch.uint8)
    expected[table[0, : 80 - EXACT_NEWEST].long()] = 1
    assert torch.equal(shadow[1].valid, expected)


def test_only_what_is_missing_is_stored_again(shadow):
    refresh(shadow[1], 60)
    assert shadow[1].stored_slots == 60 - EXACT_NEWEST
    refresh(shadow[1], 65)
    refresh(shadow[1], 65)
    assert shadow[1].stored_slots == 65 - EXACT_NEWEST


def test_stored_values_are_the_pools(shadow):
    pool, made = shadow
    slots = refresh(made, 80)[0, : 80 - EXACT_NEWEST].long()
    for layer in range(LAYERS):
        levels, scales = made.layers[layer].keys[slots], made.layers[layer].key_scales[slots]
        error = (levels * scales[..., None].float() - pool.k_buffer[layer][slots]).abs().max()
        assert error < 0.02 * pool.k_buffer[layer][slots].abs().max()


@pytest.mark.parametrize("how", ["set_kv_buffer", "move_kv_cache", "load_cpu_copy", "keyword"])
def test_writers_of_the_pool_take_the_flag_back(shadow, how):
    pool, made = shadow
    table = refresh(made, 80)
    slots, new = table[0, 5:8].long(), torch.zeros(3, HEADS, DIM)
    if how == "set_kv_buffer":
        pool.set_kv_buffer(0, KVWriteLoc(slots, None), new, new)
    elif how == "move_kv_cache":
        pool.move_kv_cache(slots, table[0, 70:73].long())
    elif how == "load_cpu_copy":
        pool.load_cpu_copy(new, slots)
    else:
        pool.move_kv_cache(tgt_loc=slots, src_loc=table[0, 70:73].long())
    assert not made.valid[slots].any()
    kept = int(made.valid.sum())
    assert kept == (0 if how == "keyword" else 80 - EXACT_NEWEST - 3)  # an unknown way costs all flags


def test_a_head_size_that_int4_cannot_have_is_one_line():
    with pytest.raises(ValueError, match="multiples of 32"):
        ShadowPool([torch.zeros(9, 1, 24)], [torch.zeros(9, 1, 24)], torch.zeros(9, dtype=torch.uint8), "int4")


def test_it_lies_where_the_pool_lies():
    """A device that computes nothing: the buffers of the shadow are all there is to see."""
    keys = [torch.empty(SLOTS, HEADS, DIM, device="meta")]
    made = ShadowPool(keys, keys, torch.zeros(SLOTS, dtype=torch.uint8, device="meta"), "int8")
    tensors = (made.layers[0].keys, made.layers[0].values, made.layers[0].key_scales, made.layers[0].value_scales)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
