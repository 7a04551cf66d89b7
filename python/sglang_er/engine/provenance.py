"""Where every output token came from, for trainers that ask (docs/provenance.md): the scheduler's side.

A step's record rides on SGLang's auxiliary output: its tensors are copied to the host with the step's own results, and
SGLang says which tokens were really committed, after stops, limits, aborts and retractions. What is written into
`customized_info`, one entry per token, SGLang slices for streaming and returns in meta_info.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from sglang_er.engine import compat

if TYPE_CHECKING:
    from sglang.srt.managers.auxiliary_output import CommittedTokens
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult

    from sglang_er.config import RolloutConfig
    from sglang_er.engine.sampler import DraftedChain
    from sglang_er.twin.twin import Twin

REQUEST_KEY = "return_provenance"  # in sampling_params.custom_params
# In meta_info: each a list as long as output_ids.
SOURCES, DRAFT_LOGPROBS = "output_token_sources", "output_token_draft_logprobs"
EPOCHS, VERSIONS = "output_token_weight_epochs", "output_token_weight_versions"
KEYS = (SOURCES, DRAFT_LOGPROBS, EPOCHS, VERSIONS)
Source = Literal["prefill", "plain", "draft", "bonus", "resampled"]


def asks(custom_params: Mapping[str, Any] | None) -> bool:
    return bool(custom_params and custom_params.get(REQUEST_KEY))


def chain_sources(accept_len: int, gamma: int) -> list[Source]:
    """Of the tokens that a step committed to a row it had drafted gamma tokens for."""
    last: Source = "bonus" if accept_len > gamma else "resampled"
    return [*["draft"] * (accept_len - 1), last]  # type: ignore[list-item]


@dataclass(frozen=True)
class StepRecord:
    """One step over a batch, as SGLang's DeviceAuxiliaryOutput and, copied, HostAuxiliaryOutput.

    `undrafted`: source of a row's only token where nothing was drafted. `rows`: indices of the rows that were drafted
    for, None = all; `logprobs` [rows, gamma] are theirs, None if there are none; `accept_lens` [batch].
    """

    for_all: bool
    undrafted: Source
    epoch: int
    version: str
    rows: list[int] | None = None
    logprobs: torch.Tensor | None = None
    accept_lens: torch.Tensor | None = None

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> StepRecord:
        if self.logprobs is None or self.accept_lens is None:
            return self
        return replace(self, logprobs=copy_tensor(self.logprobs), accept_lens=copy_tensor(self.accept_lens))

    def consume(self, batch: ScheduleBatch, commits: Sequence[CommittedTokens | None]) -> None:
        """Called once the tokens are in output_ids and before they are sent; a commit of None added none."""
        chains = self._chains()
        for row, (req, commit) in enumerate(zip(batch.reqs, commits, strict=True)):
            if not self.for_all and not asks(req.sampling_params.custom_params):
                continue
            if req.customized_info is None:
                req.customized_info = {}
            columns = [req.customized_info.setdefault(key, []) for key in KEYS]
            if commit is None:
                continue
            count = len(commit.token_ids)
            sources, logprobs = chains.get(row, ([self.undrafted], [None]))
            new = (sources[:count], logprobs[:count], [self.epoch] * count, [self.version] * count)
            for column, values in zip(columns, new, strict=True):
                column[commit.output_index :] = values

    def _chains(self) -> dict[int, tuple[list[Source], list[float | None]]]:
        """Sources and draft logprobs by row, of the rows that were drafted for, as if nothing was trimmed."""
        if self.logprobs is None or self.accept_lens is None:
            return {}
        gamma, accept_lens = self.logprobs.shape[1], self.accept_lens.tolist()
        rows = range(len(accept_lens)) if self.rows is None else self.rows
        return {
            row: (chain_sources(accept_lens[row], gamma), [*logprobs[: accept_lens[row] - 1], None])
            for row, logprobs in zip(rows, self.logprobs.tolist(), strict=True)
        }


class Provenance:
    """One per worker; does nothing while the option is off."""

    def __init__(self, twin: Twin, config: RolloutConfig) -> None:
        self._twin = twin
        self.configure(config)

    def configure(self, config: RolloutConfig) -> None:
        """Options changed; the server is idle. Raises ValueError where this SGLang cannot tell of tokens."""
        if config.provenance != "off" and not compat.adapter().has_auxiliary_output:
            raise ValueError(f"provenance: SGLang {compat.installed_sglang()} has no auxiliary outputs; leave it off")
        self._mode = config.provenance

    def wanted(self, batch: ScheduleBatch) -> bool:
        """By any request of the batch."""
        if self._mode == "request":
            return any(asks(req.sampling_params.custom_params) for req in batch.reqs)
        return self._mode == "all"

    def attach(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        undrafted: Source,
        drafted: DraftedChain | None = None,
        rows: list[int] | None = None,
    ) -> None:
        """To a step that was launched just now: the policy that it ran under is the present one."""
        if not self.wanted(batch):
            return
        from sglang.srt.managers.auxiliary_output import append_auxiliary_output
        from sglang.srt.runtime_context import get_serving

        record = StepRecord(self._mode == "all", undrafted, self._twin.weight_epoch, get_serving().weight_version)
        if drafted is not None and drafted.tokens:
            logprobs = torch.stack(drafted.logprobs, dim=1)
            record = replace(record, rows=rows, logprobs=logprobs, accept_lens=result.accept_lens)
        output = result.logits_output
        output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, record)
