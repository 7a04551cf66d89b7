"""What one speculative step hands to the next (DraftState) and to the verify pass (VerifyInput).

SpecInputType is a closed enum: members are borrowed, by the adapter of the SGLang version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.spec_info import SpecInput

from sglang_er.engine import compat

_STATE, _VERIFY = compat.adapter().spec_input_types()


@dataclass
class DraftState(SpecInput):
    """Carried between steps: the committed token that has no KV yet.

    bonus_tokens: int64 [B]. Under overlap scheduling `future_indices` (set by the scheduler) is the truth and the
    tokens are gathered from the FutureMap when the step starts.
    """

    bonus_tokens: torch.Tensor
    new_seq_lens: torch.Tensor
    future_indices: torch.Tensor | None = None

    # Read by SGLang's relay for drafters that have hidden states or top-k trees; we have neither.
    topk_p: ClassVar[None] = None
    topk_index: ClassVar[None] = None
    hidden_states: ClassVar[None] = None
    draft_probs: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__init__(_STATE)
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def get_spec_adjust_token_coefficient(self) -> tuple[int, int]:
        """Abstract in SGLang's base class up to 0.5.15."""
        return 1, 1

    def filter_batch(self, new_indices: torch.Tensor, **_: object) -> None:
        """What else is passed differs between versions of SGLang."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
            return
        self.bonus_tokens = self.bonus_tokens[new_indices]
        self.new_seq_lens = self.new_seq_lens[new_indices]

    def merge_batch(self, other: DraftState) -> None:
        if self.future_indices is not None and other.future_indices is not None:
            self.future_indices = torch.cat([self.future_indices, other.future_indices])
            return
        self.bonus_tokens = torch.cat([self.bonus_tokens, other.bonus_tokens])
        self.new_seq_lens = torch.cat([self.new_seq_lens, other.new_seq_lens])


@dataclass
class VerifyInput(SpecInput):
    """A chain of `draft_token_num` = gamma + 1 tokens per request; positions int64 flat [B * (gamma + 1)].

    slot_table: SGLang's req_to_token, int32 [rows, longest context and more].
    """

    positions: torch.Tensor
    draft_token_num: int
    slot_table: torch.Tensor
    custom_mask: torch.Tensor | None = None
    capture_hidden_mode: CaptureHiddenMode = CaptureHiddenMode.NULL
    hidden_states: torch.Tensor | None = None
    topk: int = 1

    def __post_init__(self) -> None:
        super().__init__(_VERIFY)
        self.num_tokens_per_req = self.draft_token_num
        self.num_tokens_for_logprob_per_req = self.draft_token_num

    def get_spec_adjust_token_coefficient(self) -> tuple[int, int]:
        return self.draft_token_num, self.draft_token_num

    def generate_attn_arg_prefill(
        self,
        req_pool_indices: torch.Tensor,
        paged_kernel_lens: torch.Tensor,
        paged_kernel_lens_sum: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """What FlashInfer plans a verify pass from: slots of every request's context and chain, int32 [their number];
        where those of a request begin, int32 [B + 1]; where its queries begin, int32 [B + 1]; no mask.

        paged_kernel_lens: committed tokens int [B], their sum on the host. What else comes differs between versions.
        """
        requests, width = len(req_pool_indices), self.draft_token_num
        device = req_pool_indices.device
        begins = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        begins[1:] = torch.cumsum(paged_kernel_lens + width, dim=0)
        # The sum on the host gives the size: reading it here would wait for the device.
        places = torch.arange(paged_kernel_lens_sum + requests * width, dtype=torch.int32, device=device)
        request = torch.searchsorted(begins[1:], places, right=True).clamp_(max=requests - 1)
        slots = self.slot_table[req_pool_indices.to(torch.int64)[request], (places - begins[request]).to(torch.int64)]
        queries = torch.arange(0, (requests + 1) * width, width, dtype=torch.int32, device=device)
        return slots, begins, queries, None
