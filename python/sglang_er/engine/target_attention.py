"""SGLang's attention backends on a GPU that verify drafts of every length, and what each takes for it.

triton      finds the width of a pass in the pass
flashinfer  the same, but plans on the host: lengths have to be there at every step (SGLang copies them), and the pass
            brings the slots that it reads (`VerifyInput.generate_attn_arg_prefill`)
fa3         reads one width, when it is made: there is one for every width
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_er.config import ConfigError
from sglang_er.engine import compat

SUPPORTED = ("triton", "fa3", "flashinfer")
CHOICE = "--attention-backend " + ", ".join(SUPPORTED[:-1]) + f" or {SUPPORTED[-1]}"
_ONE_WIDTH = "fa3"
# FlashInfer's own memory for each recorded batch size.
_PLAN_BYTES = 8 << 20


class TargetAttention:
    """What a runner's attention (prefill and decode may have one each) asks for. Raises ConfigError for one that is not
    supported."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.names = {runner.prefill_attention_backend_str, runner.decode_attention_backend_str}
        if others := sorted(self.names - set(SUPPORTED)):
            raise ConfigError(f"attention backend {', '.join(others)}: verify passes of every length need {CHOICE}")
        if "flashinfer" in self.names and runner.sliding_window_size is not None:
            raise ConfigError(
                "flashinfer does not verify drafts over a sliding window: --attention-backend triton or fa3"
            )

    def __str__(self) -> str:
        names = " and ".join(sorted(self.names))
        return f"{names}, one backend for every width of verify pass" if self.unrecorded else names

    @property
    def unrecorded(self) -> Callable[[int], Any] | None:
        """Makes a backend for a width, if passes without a graph need one, too; else None."""
        return partial(make, self._runner) if _ONE_WIDTH in self.names else None

    def graph_nbytes(self, width: int, batch_sizes: list[int]) -> int:
        """Buffers of a backend whose verify passes of that width are recorded, beside the graphs themselves."""
        context, most = int(self._runner.model_config.context_len), max(batch_sizes)
        nbytes = 0
        if "triton" in self.names:  # KV indices, int64
            nbytes += 8 * most * width * context
        if "fa3" in self.names:  # four page tables, int32
            nbytes += 4 * 4 * most * -(-context // int(self._runner.page_size))
        if "flashinfer" in self.names:  # KV indices, int32, and a mask, uint8; what each batch size plans into
            nbytes += 5 * most * width * context + _PLAN_BYTES * len(batch_sizes)
        return nbytes


def make(runner: Any, width: int) -> Any:
    """An attention backend of `runner` for verify passes of `width` tokens a request. FlashInfer's share the runner's
    workspace: who plans into it and who reads it follow each other on one stream."""
    with compat.adapter().verify_width(runner, width):
        return runner._get_attention_backend(init_new_workspace=False)


def host_lengths(runner: Any, batch: Any) -> Any:
    """Committed tokens of a decode batch on the host, int64 [B], if its attention asks for them there; else None."""
    return batch.seq_lens_cpu if getattr(runner.attn_backend, "needs_cpu_seq_lens", True) else None
