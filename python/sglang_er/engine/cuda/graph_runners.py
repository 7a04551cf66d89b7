"""SGLang's decode graph runner, made to record plain decode and verify passes of any width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_exec
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_er.engine import target_attention
from sglang_er.engine.spec_inputs import VerifyInput
from sglang_er.engine.target_graphs import MOST_ROWS, Recorded, TargetGraphs

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.config import RolloutConfig
    from sglang_er.engine.target_attention import TargetAttention


class PlainDecodeRunner(DecodeCudaGraphRunner):
    """What SGLang records without speculation: one token a request."""

    def __init__(self, model_runner: ModelRunner, **options: Any) -> None:
        algorithm = model_runner.spec_algorithm
        model_runner.spec_algorithm = SpeculativeAlgorithm.NONE
        try:
            super().__init__(model_runner, **options)
        finally:
            model_runner.spec_algorithm = algorithm


class VerifyRunner(DecodeCudaGraphRunner):
    """Verify passes of `speculative_num_draft_tokens` tokens a request."""

    def get_spec_info(self, num_tokens: int) -> VerifyInput:
        return VerifyInput(
            positions=self.buffers.positions[:num_tokens],
            draft_token_num=self.speculative_num_draft_tokens,
            slot_table=self.model_runner.req_to_token_pool.req_to_token,
        )


def prepare(runner: ModelRunner, gamma_max: int) -> None:
    """Before SGLang makes its graph runners: they shall record plain decode, and the logits buffer that all graphs
    share shall hold the largest pass that is recorded at all."""
    decode = get_exec().graph.cuda_graph_config.decode
    runner._decode_cuda_graph_runner_cls = lambda: PlainDecodeRunner
    runner.max_decode_logits_rows = lambda: max(max(decode.bs), MOST_ROWS, gamma_max + 1)


def target_graphs(runner: ModelRunner, config: RolloutConfig, attention: TargetAttention) -> TargetGraphs:
    """Raises RuntimeError where SGLang has recorded something else than plain decode."""
    plain = runner.decode_cuda_graph_runner
    if not isinstance(plain, PlainDecodeRunner):
        raise RuntimeError(
            f"sglang-er: SGLang's decode graphs are recorded by {type(plain).__name__}; use --disable-cuda-graph"
        )

    def capture(width: int, batch_sizes: list[int]) -> Recorded:
        backend = target_attention.make(runner, width)
        with _batch_sizes(batch_sizes):
            graphs = VerifyRunner(
                runner,
                attn_backend=backend,
                speculative_num_steps=width - 1,
                speculative_num_draft_tokens=width,
            )
        return Recorded(backend, graphs)

    def memory() -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    budget = (config.graph_memory_mb << 20, config.graph_seconds)
    return TargetGraphs(runner, capture, memory, budget, attention.graph_nbytes, attention.unrecorded)


@contextmanager
def _batch_sizes(sizes: list[int]) -> Iterator[None]:
    """SGLang reads the batch sizes to record from its configuration."""
    decode = get_exec().graph.cuda_graph_config.decode
    before, decode.bs = decode.bs, sizes
    try:
        yield
    finally:
        decode.bs = before
