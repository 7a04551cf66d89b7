"""Rows that cannot be drafted for, in a step where others are: one token from SGLang's standard sampler.

Position 0 of the verify pass holds exactly the logits of a plain decode step. SGLang's sampler runs on all rows
(its penalties, masks and processors are laid out for the whole batch); only the rows that need it are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_er.engine.rows import speculates

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class StandardSample(NamedTuple):
    """tokens int64 [B] and the sampler's output (logprobs) for all rows of the batch."""

    tokens: torch.Tensor
    output: Any


def sample(runner: ModelRunner, batch: ScheduleBatch, logits: torch.Tensor) -> StandardSample:
    """logits [B, V] of position 0; copied, because the sampler turns its input into probabilities."""
    output = LogitsProcessorOutput(next_token_logits=logits.clone())
    # What ForwardBatch.init_new does for a plain decode step: the masks are built from the live grammar states.
    batch.sampling_info.grammars = [req.grammar for req in batch.reqs] if batch.has_grammar else None
    step = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(batch.reqs),
        input_ids=batch.spec_info.bonus_tokens,
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens + 1,
        out_cache_loc=None,
        seq_lens_sum=None,
        positions=batch.seq_lens.to(torch.int64),
        sampling_info=batch.sampling_info,
        return_logprob=batch.return_logprob,
        top_logprobs_nums=batch.top_logprobs_nums,
        token_ids_logprobs=batch.token_ids_logprobs,
    )
    tokens = runner.sample(output, step)
    return StandardSample(tokens.to(torch.int64), output)


def merge(
    standard: StandardSample, tokens: torch.Tensor, accept_lens: torch.Tensor, speculating: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculating rows' (tokens [R, n], accept_lens [R]) and the others' single tokens -> [B, n], [B]."""
    all_tokens = standard.tokens[:, None].repeat(1, tokens.shape[1])
    all_tokens[speculating] = tokens
    all_lens = torch.ones(standard.tokens.shape[0], dtype=torch.int32, device=tokens.device)
    all_lens[speculating] = accept_lens
    return all_tokens, all_lens


def merge_logprobs(standard: StandardSample, output: Any, batch: ScheduleBatch, width: int) -> None:
    """Put the standard rows' logprobs (of the penalized, masked distribution) over those made from raw logits."""
    others = [i for i, req in enumerate(batch.reqs) if not speculates(req)]
    output.next_token_logprobs[others, 0] = standard.output.next_token_logprobs[others]
    for name in (
        "next_token_top_logprobs_val",
        "next_token_top_logprobs_idx",
        "next_token_token_ids_logprobs_val",
        "next_token_token_ids_logprobs_idx",
    ):
        mine, theirs = getattr(output, name, None), getattr(standard.output, name, None)
        if mine is None or theirs is None:
            continue
        for row in others:
            mine[row * width] = theirs[row]
