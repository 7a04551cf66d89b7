"""What a trainer gets of the GPU's memory by /release_memory_occupation: our buffers lie under SGLang's own tags.

weights     the twin's packed weights: it is stale when they are back, and remade before it drafts
kv_cache    the KV shadow and its flags, which are all cleared when they are back
cuda_graph  what draft passes leave for verification, and what their graphs hold, where SGLang's own are held so

Released memory comes back at the same addresses, which graphs read, and without its contents; only what graphs hold is
kept meanwhile, as SGLang keeps its own. Between the two nothing of ours is read or written.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_CUDA_GRAPH as CUDA_GRAPH
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE as KV_CACHE
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS as WEIGHTS

from sglang_er.engine import compat

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.engine.worker import EfficientRolloutWorker

__all__ = ["CUDA_GRAPH", "KV_CACHE", "WEIGHTS", "SavedMemory", "describe", "released", "resumed"]


class SavedMemory:
    """One per worker. `away`: tags that are released. Without --enable-memory-saver nothing is ever unmapped, and all
    else is the same."""

    def __init__(self, runner: ModelRunner) -> None:
        adapter = compat.adapter()
        self._saver: Any = adapter.memory_saver(runner)
        self.enabled = bool(self._saver.enabled)
        self.holds_graphs = self.enabled and adapter.saves_graphs()
        self.away: frozenset[str] = frozenset()

    def region(self, tag: str) -> AbstractContextManager[None]:
        """Around allocations and nothing else: whatever is allocated inside stays the tag's, scratch memory too."""
        context: AbstractContextManager[None] = self._saver.region(tag)
        return context

    def recording(self, graph: torch.cuda.CUDAGraph, pool: Any) -> AbstractContextManager[None]:
        """Around what `graph` records."""
        # The scheduler's copies run on other streams meanwhile: only this thread must not disturb the recording.
        if not self.holds_graphs:
            return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        context: AbstractContextManager[None] = self._saver.cuda_graph(
            cuda_graph=graph, pool=pool, capture_error_mode="thread_local", tag=CUDA_GRAPH, enable_cpu_backup=True
        )
        return context


def released(worker: EfficientRolloutWorker, tags: Collection[str]) -> None:
    """Before SGLang takes away what lies under these tags."""
    if WEIGHTS in tags:
        worker.twin.policy_changed()  # a draft of this twin would be an error from here on
    worker.memory.away |= frozenset(tags)


def resumed(worker: EfficientRolloutWorker, tags: Collection[str]) -> None:
    """After it is back, before anything reads it."""
    worker.memory.away -= frozenset(tags)
    if KV_CACHE in tags:
        worker.drafter.forget_kv()
    if WEIGHTS in tags:
        worker.sync.changed()


def describe(worker: EfficientRolloutWorker) -> dict[str, object]:
    """What is away, and the bytes that we have under each tag: released only if there is a `saver`. Verify graphs go
    with cuda_graph and are not counted: what they took (`graphs`) holds attention workspaces, which stay."""
    shadow, memory = worker.drafter.shadow(), worker.memory
    return {
        "saver": memory.enabled,
        "released": sorted(memory.away),
        "nbytes": {
            WEIGHTS: sum(layer.nbytes for layer in worker.twin.layers),
            KV_CACHE: 0 if shadow is None else shadow.nbytes,
            CUDA_GRAPH: worker.drafter.graph_nbytes(),
        },
    }
