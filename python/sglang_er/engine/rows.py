"""Which rows of a batch may be drafted for.

A row whose next-token distribution depends on its own output through state that SGLang keeps per step
(penalties, grammar) or through code that we cannot run at every drafted position (custom processors) takes its
one token from position 0 of the verify pass under the standard sampler; the other rows go on speculating.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def speculates(req: Req) -> bool:
    """Fixed for the life of a request: every condition is one of its own parameters."""
    params = req.sampling_params
    return not (
        req.grammar is not None
        or req.custom_logit_processor is not None
        or params.logit_bias is not None
        or params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > 0
        or req.return_hidden_states
    )


def any_standard_row(batch: ScheduleBatch) -> bool:
    """Quick test, without walking the requests: can any row need the standard sampler?"""
    info = batch.sampling_info
    penalized = info.acc_additive_penalties is not None or info.acc_scaling_penalties is not None
    if info.penalizer_orchestrator is not None:
        penalized = penalized or info.penalizer_orchestrator.is_required
    return (
        penalized
        or bool(info.grammars)
        or batch.has_grammar
        or info.logit_bias is not None
        or info.has_custom_logit_processor
        or batch.return_hidden_states
    )


def speculating_rows(batch: ScheduleBatch) -> list[int] | None:
    """Indices of the rows to draft for, ascending; None when that is every row. Host data: no device sync."""
    if not any_standard_row(batch):
        return None
    index = [i for i, req in enumerate(batch.reqs) if speculates(req)]
    return None if len(index) == len(batch.reqs) else index


def tokens_left(reqs: list[Req]) -> int:
    """Most tokens that any of these requests may still emit (host view: under overlap it can only be too high)."""
    left = 0
    for req in reqs:
        left = max(left, req.sampling_params.max_new_tokens - len(req.output_ids))
    return left
