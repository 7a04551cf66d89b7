"""Drafting and verifying under SGLang's sampling parameters: which exact rule applies to a batch.

greedy     all rows take the argmax; a draft is kept if it is the target's argmax.
seeded     deterministic inference: draft and target choose with SGLang's own per-(seed, position) Gumbel noise; a
           draft is kept if it is the target's choice, so the output is plain decode's, token for token.
rejection  everything else: drafts from the filtered q, verified against the filtered p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch

from sglang_er import kernels
from sglang_er.kernels.registry import REFERENCE
from sglang_er.sampling.chain import ChainResult, verify_chain, verify_choices
from sglang_er.sampling.draft import draft_sample
from sglang_er.sampling.filters import FilterParams, filtered_probs

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


@dataclass
class DraftedChain:
    """reach: the most tokens that are drafted, 0 if nobody knows; tokens: one int64 [B] per drafted position; probs:
    the q [B, V] each was drawn from (rejection only); in_one: [reach or gamma, B, V], the buffer that they are views
    of, if it is one; confidences: one list [B] per position, where the draft may stop early; logprobs: one float [B]
    per position, where drafts are scored; seconds: of the draft pass, nan if unknown.
    """

    reach: int = 0
    tokens: list[torch.Tensor] = field(default_factory=list)
    probs: list[torch.Tensor] = field(default_factory=list)
    in_one: torch.Tensor | None = None
    confidences: list[list[float]] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    seconds: float = math.nan

    def place(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Where the next token's q, of logits [B, V], goes; None for anywhere."""
        if self.in_one is None and self.reach:
            self.in_one = torch.empty((self.reach, *logits.shape), dtype=torch.float32, device=logits.device)
        return None if self.in_one is None else self.in_one[len(self.probs)]

    def q(self) -> torch.Tensor:
        """What the tokens were drawn from, [B, gamma, V]; strided, not copied, where it lies in one buffer."""
        if self.in_one is None:
            return torch.stack(self.probs, dim=1)
        return self.in_one[: len(self.probs)].transpose(0, 1)


def filter_params(info: SamplingBatchInfo) -> FilterParams:
    return FilterParams(
        info.temperatures,
        info.top_ps,
        info.top_ks,
        info.min_ps,
        info.need_top_p_sampling,
        info.need_top_k_sampling,
        info.need_min_p_sampling,
    )


class StepSampler:
    """The sampling rule of one step over R rows (all speculating rows of the batch). `scores`: drafts are scored."""

    scores = False

    def __init__(self, info: SamplingBatchInfo, rows: torch.Tensor | None) -> None:
        self.greedy = bool(info.is_all_greedy)
        self.params = filter_params(info)
        self.seeds: torch.Tensor | None = info.sampling_seed
        if rows is not None:
            self.params = self.params.rows(rows)
            self.seeds = None if self.seeds is None else self.seeds[rows]
        self._check()

    @classmethod
    def of(cls, params: FilterParams, greedy: bool, seeds: torch.Tensor | None) -> StepSampler:
        """A sampler whose rule and tensors are given, all rows of them."""
        sampler = cls.__new__(cls)
        sampler.greedy, sampler.params, sampler.seeds = greedy, params, seeds
        sampler._check()
        return sampler

    def _check(self) -> None:
        if self.seeds is not None and self.params.need_min_p:
            raise RuntimeError("min_p with deterministic inference reached the sampler; admission must refuse it")

    @property
    def rule(self) -> str:
        return "greedy" if self.greedy else "rejection" if self.seeds is None else "seeded"

    def draft(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        drafted: DraftedChain,
        probs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Choose one draft per row from the twin's logits [R, V] at `positions` [R]; recorded in `drafted`.
        `probs` fp32 [R, V]: where q is written (rejection only), without it `drafted.place`."""
        if self.greedy:
            tokens = logits.argmax(dim=-1)
        elif self.seeds is not None:
            tokens = self._seeded_draft(logits, self.seeds, positions)
        else:
            tokens, probs = draft_sample(logits, self.params, drafted.place(logits) if probs is None else probs)
            drafted.probs.append(probs)
        drafted.tokens.append(tokens)
        return tokens

    def confidences(self, logits: torch.Tensor, drafted: DraftedChain) -> list[float]:
        """Of the tokens drafted last, from logits [R, V]: the twin's largest probability, unfiltered. Recorded."""
        if self.rule == "rejection" and self.params.unfiltered:
            probs = drafted.probs[-1]
        else:
            probs = kernels.softmax_rows(logits, self.params.temperatures.flatten())
        drafted.confidences.append(probs.amax(dim=-1).tolist())
        return drafted.confidences[-1]

    def score(self, logits: torch.Tensor, drafted: DraftedChain) -> None:
        """Record the twin's logprobs of the tokens drafted last, from logits [R, V]: under temperature alone, as SGLang
        returns the policy's."""
        index, original = drafted.tokens[-1][:, None], envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get()
        if self.rule == "rejection" and self.params.unfiltered and not original:
            logprobs = drafted.probs[-1].gather(-1, index).log()
        else:
            logits = logits.float() if self.greedy or original else logits / self.params.temperatures
            logprobs = logits.gather(-1, index) - logits.logsumexp(dim=-1, keepdim=True)
        drafted.logprobs.append(logprobs.squeeze(-1))

    def verify(
        self, logits: torch.Tensor, positions: torch.Tensor, drafted: DraftedChain, in_place: bool = False
    ) -> ChainResult:
        """logits [R * (gamma + 1), V], positions flat alike -> committed tokens and accept lengths. `in_place`: nobody
        needs the logits afterwards."""
        gamma = len(drafted.tokens)
        drafts = torch.stack(drafted.tokens, dim=1)
        if self.greedy:
            return verify_choices(logits.argmax(dim=-1).view(-1, gamma + 1), drafts)
        params = self.params.repeat(gamma + 1)
        if self.seeds is not None:
            choices = self._seeded(logits, params, self.seeds.repeat_interleave(gamma + 1), positions)
            return verify_choices(choices.view(-1, gamma + 1), drafts)
        p = filtered_probs(logits, params, in_place).view(drafts.shape[0], gamma + 1, -1)
        return verify_chain(p, drafted.q(), drafts)

    def _seeded_draft(self, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `_seeded`, by one kernel where there is one: fp32's last bit may make it another token, which then is not
        the target's choice and is not kept. Under filters the noise goes by sorted rank, which is left to SGLang."""
        device, op = logits.device.type, "choose_seeded"
        fused = self.params.unfiltered and device != "cpu"
        if not fused or kernels.active_implementation(op, device, logits.dtype) == REFERENCE:
            return self._seeded(logits, self.params, seeds, positions)
        return kernels.choose_seeded(logits, self.params.temperatures.flatten(), seeds, positions)

    @staticmethod
    def _seeded(
        logits: torch.Tensor, params: FilterParams, seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """SGLang's seeded sampler itself, so that its noise layout (by sorted rank under filters) is kept."""
        probs = torch.softmax(logits / params.temperatures, dim=-1)
        if params.need_top_p or params.need_top_k:
            tokens = top_k_top_p_min_p_sampling_from_probs_torch(
                probs, params.top_ks, params.top_ps, params.min_ps, False, seeds, positions
            )
        else:
            tokens = sampling_from_probs_torch(probs, sampling_seed=seeds, positions=positions)
        return tokens.to(torch.int64)
