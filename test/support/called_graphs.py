"""Plain decode and verify passes through SGLang's graph runners on a CPU: what a CUDA graph would replay is called
again.

Everything else is SGLang's and ours as on a GPU: which forward modes and widths are recorded, at which batch sizes;
fixed input buffers, filled and padded at every replay; attention metadata made outside of the graph; outputs in one
shared buffer. `install_fa3` and `install_triton` are hooks for a real server
(`SGLANG_ER_TEST_HOOK=support.called_graphs:install_fa3`, `--er-executor wrapped`, `TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from support import gpu_attention
from support.host_reads import HostReads

BATCH_SIZES = [1, 4, 8]


class CalledGraphs:
    """A `BaseCudaGraphBackend` of SGLang's. A graph holds not only a function but also which buffers it reads: the
    attention metadata of the time of recording."""

    def __init__(self, runner: Any) -> None:
        self._attention = runner.attn_backend
        self._recorded: dict[Any, tuple[Callable[[], Any], Any]] = {}

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        for _ in range(2):  # as before a recording
            forward_fn()
            if post_warmup_hook is not None:
                post_warmup_hook()
        forward_fn()
        self._recorded[shape_key] = forward_fn, self._attention.forward_metadata

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._recorded

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **_: Any) -> Any:
        forward_fn, self._attention.forward_metadata = self._recorded[shape_key]
        return forward_fn()

    def cleanup(self) -> None:
        self._recorded.clear()


def install_fa3(worker: Any) -> None:
    """Attention is FlashAttention 3's, its kernels in plain torch; graphs are made as soon as the engine is there."""
    gpu_attention.install_fa3(worker)
    _install(worker, "fa3")


def install_triton(worker: Any) -> None:
    """Attention is SGLang's own in Triton. The host may look at no value while a draft pass is made."""
    from sglang_er.engine.graphs import EagerGraphs

    gpu_attention.install_triton(worker)
    run, seen = EagerGraphs.run, set()

    def watched(self: EagerGraphs, key: Hashable, function: Callable[[], None]) -> None:
        if key not in seen:  # as before a recording
            seen.add(key)
            function()
        with HostReads() as reads:
            run(self, key, function)
        assert not reads.found, f"the host reads within a draft pass: {sorted(set(reads.found))}"

    EagerGraphs.run = watched  # type: ignore[method-assign]
    _install(worker, "triton")


def _install(worker: Any, attention: str) -> None:
    _pretend_a_device()
    made = worker.init_cuda_graphs

    def init_cuda_graphs() -> None:
        made()
        with torch.no_grad():
            _record(worker, attention)

    worker.init_cuda_graphs = init_cuda_graphs


def _pretend_a_device() -> None:
    """What SGLang's runners ask of a GPU besides kernels."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as module

    @contextmanager
    def graph_capture(stream: Any) -> Iterator[Any]:
        yield SimpleNamespace(stream=stream)

    module.resolve_decode_backend = CalledGraphs
    module.graph_capture = graph_capture
    module.get_or_create_global_graph_capture_stream = lambda: None
    module.DecodeCudaGraphRunner._record_in_graph_metadata_prep_done = lambda self: None
    module.DecodeCudaGraphRunner._publish_read_done = lambda self, in_graph: None
    ForwardMode.is_cpu_graph = ForwardMode.is_cuda_graph
    torch.cuda.mem_get_info = lambda *_: (1 << 30, 2 << 30)


def _record(worker: Any, attention: str) -> None:
    """As `EfficientRolloutWorker` and SGLang do on a GPU."""
    from sglang.srt.runtime_context import get_exec

    from sglang_er.engine.cuda import graph_runners
    from sglang_er.engine.target_attention import TargetAttention

    runner = worker.model_runner
    runner.prefill_attention_backend_str = runner.decode_attention_backend_str = attention
    get_exec().graph.cuda_graph_config.decode.bs = BATCH_SIZES
    graph_runners.prepare(runner, worker.config.gamma_max)
    runner.decode_cuda_graph_runner = runner._decode_cuda_graph_runner_cls()(runner)
    worker._records = True
    worker.target_graphs = worker._make_target_graphs(TargetAttention(runner))
    worker.target_graphs.record(worker.config.gamma_max, BATCH_SIZES)
    _let_no_plain_step_be_eager(runner)


def _let_no_plain_step_be_eager(runner: Any) -> None:
    """Drafts are: they are bound to no graph."""
    execute = runner.eager_runner.execute

    def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
        recorded = runner.decode_cuda_graph_runner is not None and batch.batch_size <= max(BATCH_SIZES)
        assert not (batch.forward_mode.is_decode() and recorded), "a plain step ran without its graph"
        return execute(batch, *args, **kwargs)

    runner.eager_runner.execute = watched
