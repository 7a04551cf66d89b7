"""The two forwards of a speculative step as SGLang ForwardBatches: one drafted token, and the verify pass.

Convention (SGLang's spec V2): `committed` int64 [B] = tokens whose KV is final; the bonus token sits at position
`committed` without KV. Slots for positions committed .. committed + gamma were reserved by the scheduler before
the step; the draft pass writes provisional KV there and the verify pass overwrites all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_er.engine.spec_inputs import VerifyInput

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


class Chain(NamedTuple):
    """Rows of a step: req_pool_indices [B], committed int64 [B], slots int64 [B, gamma + 1]. `on_host`: `committed` on
    the CPU, where it is known there: attention backends that plan there need it."""

    req_pool_indices: torch.Tensor
    committed: torch.Tensor
    slots: torch.Tensor
    on_host: torch.Tensor | None = None

    def first(self, gamma: int) -> Chain:
        """The chain of a draft that ended after `gamma` tokens."""
        return self._replace(slots=self.slots[:, : gamma + 1])

    def rows(self, rows: list[int], index: torch.Tensor) -> Chain:
        """`index` int64: the same `rows`, where the chain is."""
        on_host = None if self.on_host is None else self.on_host[rows]
        return Chain(self.req_pool_indices[index], self.committed[index], self.slots[index], on_host)


def make_chain(
    runner: ModelRunner,
    req_pool_indices: torch.Tensor,
    committed: torch.Tensor,
    gamma: int,
    on_host: torch.Tensor | None = None,
) -> Chain:
    """Look up the reserved slots of positions committed .. committed + gamma."""
    positions = committed[:, None] + torch.arange(gamma + 1, device=committed.device)
    slots = runner.req_to_token_pool.req_to_token[req_pool_indices.to(torch.int64)[:, None], positions]
    if committed.device.type == "cpu":
        on_host = committed
    return Chain(req_pool_indices, committed, slots.to(torch.int64), on_host)


def _lengths(on_device: torch.Tensor, on_host: torch.Tensor | None) -> dict[str, Any]:
    """What a ForwardBatch says of its rows' lengths; on the host where they are known there."""
    return {
        "seq_lens": on_device,
        "seq_lens_cpu": on_host,
        "seq_lens_sum": None if on_host is None else int(on_host.sum()),
    }


def draft_logits(runner: ModelRunner, chain: Chain, step: int, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] after `tokens` int64 [B] at position committed + step. The caller has switched to the twin."""
    on_host = None if chain.on_host is None else chain.on_host + step + 1
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=tokens.shape[0],
        input_ids=tokens,
        req_pool_indices=chain.req_pool_indices,
        out_cache_loc=chain.slots[:, step].contiguous(),
        **_lengths(chain.committed + step + 1, on_host),
        positions=chain.committed + step,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        # A DECODE batch with spec_info means something else to several attention backends.
        spec_info=None,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )
    logits: torch.Tensor = runner.forward(batch).logits_output.next_token_logits
    return logits


def make_verify_batch(runner: ModelRunner, chain: Chain, tokens: torch.Tensor) -> ForwardBatch:
    """Verify pass over tokens int64 [B, gamma + 1] = bonus, drafts."""
    width = tokens.shape[1]
    positions = (chain.committed[:, None] + torch.arange(width, device=tokens.device)).reshape(-1)
    return ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=tokens.shape[0],
        input_ids=tokens.reshape(-1),
        req_pool_indices=chain.req_pool_indices,
        out_cache_loc=chain.slots.reshape(-1),
        **_lengths(chain.committed, chain.on_host),
        positions=positions,
        spec_algorithm=runner.spec_algorithm,
        spec_info=VerifyInput(
            positions=positions, draft_token_num=width, slot_table=runner.req_to_token_pool.req_to_token
        ),
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )
