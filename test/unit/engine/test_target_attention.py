"""What attention backends of a GPU are given so that they verify drafts of every length, and what they are refused.

SGLang's own backends run in test/e2e/test_target_attention.py (full matrix), with their kernels pretended.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.runtime_context import get_context, get_spec
from support.gpu_attention import fa3_backend, flash_attn_with_kvcache

from sglang_er.config import ConfigError
from sglang_er.engine import forward, target_attention
from sglang_er.engine.spec_inputs import VerifyInput
from sglang_er.engine.target_attention import TargetAttention, host_lengths
from sglang_er.kernels import paged_attention

HEADS, KV_HEADS, DIM, CONTEXT = 4, 2, 16, 64


def runner(prefill: str = "fa3", decode: str | None = None, **fields: Any) -> SimpleNamespace:
    config = SimpleNamespace(context_len=CONTEXT)
    return SimpleNamespace(
        prefill_attention_backend_str=prefill,
        decode_attention_backend_str=decode or prefill,
        sliding_window_size=None,
        page_size=1,
        model_config=config,
        **fields,
    )


# -- which are supported ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("trtllm_mha",), ("fa3", "trtllm_mha")])
def test_others_are_refused_in_one_line(names: tuple[str, ...]):
    with pytest.raises(ConfigError, match=r"trtllm_mha.*--attention-backend triton, fa3 or flashinfer"):
        TargetAttention(runner(*names))


def test_flashinfer_over_a_sliding_window_is_refused():
    windowed = runner("flashinfer")
    windowed.sliding_window_size = 128
    with pytest.raises(ConfigError, match="--attention-backend triton or fa3"):
        TargetAttention(windowed)


@pytest.mark.parametrize(
    ("names", "one_width"),
    [(("triton",), False), (("flashinfer",), False), (("fa3",), True), (("triton", "fa3"), True)],
)
def test_who_reads_one_width_has_a_backend_for_each(names: tuple[str, ...], one_width: bool):
    assert (TargetAttention(runner(*names)).unrecorded is not None) == one_width


def test_memory_of_recorded_backends_is_known_before():
    """Page tables do not grow with the width, indices do; FlashInfer's plans count by batch size."""
    sizes = [1, 8]
    assert TargetAttention(runner("triton")).graph_nbytes(4, sizes) == 8 * 8 * 4 * CONTEXT
    assert TargetAttention(runner("fa3")).graph_nbytes(4, sizes) == 16 * 8 * CONTEXT
    assert TargetAttention(runner("flashinfer")).graph_nbytes(4, sizes) == 5 * 8 * 4 * CONTEXT + 2 * (8 << 20)


@pytest.mark.parametrize(("needs", "given"), [(True, True), (False, False), (None, True)])
def test_lengths_on_the_host_are_for_those_who_ask(needs: bool | None, given: bool):
    """Backends of SGLang 0.5.15 do not say; they may read them."""
    backend = SimpleNamespace() if needs is None else SimpleNamespace(needs_cpu_seq_lens=needs)
    lengths = torch.tensor([3, 4])
    found = host_lengths(SimpleNamespace(attn_backend=backend), SimpleNamespace(seq_lens_cpu=lengths))
    assert (found is lengths) == given


# -- FlashAttention 3 ------------------------------------------------------------------------------------------------


class World(SimpleNamespace):
    """Three requests in a paged pool of random keys and values, and a runner as FlashAttention 3 sees it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        table = (torch.randperm(4 * CONTEXT) + 1).view(4, CONTEXT).to(torch.int32)
        keys, values = torch.randn(2, 4 * CONTEXT + 1, KV_HEADS, DIM).unbind()
        config = SimpleNamespace(
            is_encoder_decoder=False,
            context_len=CONTEXT,
            attention_arch=None,
            head_dim=DIM,
            hf_text_config=SimpleNamespace(num_attention_heads=HEADS),
            get_num_kv_heads=lambda ranks: KV_HEADS,
            is_local_attention_model=False,
        )
        own = runner(device="cpu", is_draft_worker=False, attn_cp_size=1, kv_cache_dtype=torch.float32)
        own.__dict__.update(
            model_config=config,
            kv_cache_dtype_str="auto",
            req_to_token_pool=SimpleNamespace(req_to_token=table, size=4),
            token_to_kv_pool=SimpleNamespace(),
            kv_index_translator=SimpleNamespace(is_translating=False),
            spec_algorithm=None,
        )
        own._get_attention_backend = lambda init_new_workspace: fa3_backend()(own)
        super().__init__(table=table, keys=keys, values=values, runner=own)


@pytest.fixture
def world() -> Any:
    fields = {"speculative_num_draft_tokens": 8, "speculative_eagle_topk": 1, "speculative_num_steps": 7}
    with get_context().override_server_args(**fields), get_context().parallel.override(attn_tp_size=1, attn_tp_rank=0):
        yield World()


def verified(world: World, backend: Any, width: int, on_host: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What that backend's metadata makes of a verify pass, and the right result; [tokens, heads, dim]."""
    rows, committed = torch.tensor([2, 0, 3]), torch.tensor([5, 40, 17])
    chain = forward.make_chain(world.runner, rows, committed, width - 1)
    if not on_host:
        chain = chain._replace(on_host=None)
    batch = forward.make_verify_batch(world.runner, chain, torch.zeros(3, width, dtype=torch.int64))
    backend.init_forward_metadata(batch)
    metadata, q = backend.forward_metadata, torch.randn(3 * width, HEADS, DIM)
    got = flash_attn_with_kvcache(
        q,
        world.keys[:, None],
        world.values[:, None],
        metadata.page_table,
        metadata.cache_seqlens_int32,
        metadata.cu_seqlens_q,
        DIM**-0.5,
        True,
        (-1, -1),
    )
    begins = torch.arange(0, 3 * width + 1, width)
    expected = paged_attention(
        q, world.keys, world.values, world.table, rows, begins, committed + width, scale=DIM**-0.5
    )
    return got, expected


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_a_backend_made_for_a_width_verifies_that_width(world: World, width: int, on_host: bool):
    torch.testing.assert_close(*verified(world, target_attention.make(world.runner, width), width, on_host))
    assert get_spec().speculative_num_draft_tokens == 8, "the width of the next backend that SGLang makes"


def test_the_runners_own_backend_verifies_the_longest_alone(world: World):
    """What the others are for."""
    own = world.runner._get_attention_backend(init_new_workspace=False)
    torch.testing.assert_close(*verified(world, own, 8, True))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.testing.assert_close(*verified(world, own, 3, True))


# -- FlashInfer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [2, 5])
def test_slots_of_a_pass_follow_each_other(width: int, dtype: torch.dtype):
    """Rows of a recorded batch beyond the real ones count as others do: SGLang fills their lengths, and the sum."""
    table = torch.randint(1, 10_000, (6, CONTEXT + 8), dtype=torch.int32)
    rows, lengths = torch.tensor([4, 1, 1, 0]), [7, CONTEXT, 1, 1]
    verify = VerifyInput(positions=torch.zeros(0), draft_token_num=width, slot_table=table)
    slots, begins, queries, mask = verify.generate_attn_arg_prefill(
        rows, torch.tensor(lengths, dtype=dtype), sum(lengths), table
    )
    expected = [table[row, : length + width] for row, length in zip(rows.tolist(), lengths)]
    assert slots.dtype == begins.dtype == queries.dtype == torch.int32 and mask is None
    assert slots.tolist() == torch.cat(expected).tolist()
    assert begins.tolist() == [sum(map(len, expected[:i])) for i in range(5)]
    assert queries.tolist() == [i * width for i in range(5)]


def test_sglang_0523_asks_by_name():
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    verify = VerifyInput(positions=torch.zeros(0), draft_token_num=2, slot_table=table)
    slots, *_ = verify.generate_attn_arg_prefill(
        req_pool_indices=torch.tensor([1]),
        paged_kernel_lens=torch.tensor([3]),
        paged_kernel_lens_sum=3,
        translator=None,
        plan=None,
        kind=None,
    )
    assert slots.tolist() == [20, 21, 22, 23, 24]


# -- lengths on the host ---------------------------------------------------------------------------------------------


def test_a_pass_brings_the_lengths_that_it_has_on_the_host():
    """And asks the device for none."""
    table = torch.arange(80, dtype=torch.int32).view(2, 40)
    given: list[Any] = []

    def run(batch: Any) -> Any:
        given.append(batch)
        return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=None))

    it = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        spec_algorithm=None,
        forward=run,
    )
    chain = forward.make_chain(it, torch.tensor([1, 0]), torch.tensor([5, 9]), 3)
    on_host = torch.tensor([5, 9])
    chain = chain._replace(on_host=on_host)
    verify = forward.make_verify_batch(it, chain, torch.zeros(2, 4, dtype=torch.int64))
    assert verify.seq_lens_cpu is on_host and verify.seq_lens_sum == 14
    forward.draft_logits(it, chain.first(2).rows([1], torch.tensor([1])), 1, torch.tensor([3]))
    assert given[0].seq_lens_cpu.tolist() == [11] and given[0].seq_lens_sum == 11 and given[0].seq_lens.tolist() == [11]
    nothing = forward.make_verify_batch(it, chain._replace(on_host=None), torch.zeros(2, 4, dtype=torch.int64))
    assert nothing.seq_lens_cpu is None and nothing.seq_lens_sum is None
