"""The draft pass: who computes the logits of a drafted token.

wrapped  SGLang's own model with its linears switched to the twin: the reference, and the way of every model that
         the native executor does not know.
native   the executor's decoder, made from the same packed weights.
loop     the wrapped model again, all tokens of a pass in one function of fixed buffers that a CUDA graph can hold.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from sglang_er.config import ConfigError
from sglang_er.engine import compat, forward, graphs
from sglang_er.engine.draft_loop import DraftLoop
from sglang_er.engine.graphs import CudaGraphs, EagerGraphs
from sglang_er.engine.pool_watch import OTHERS, shadow_pool, watch_pool
from sglang_er.engine.ranks import ALONE, Ranks
from sglang_er.engine.saved_memory import KV_CACHE, SavedMemory
from sglang_er.engine.target_graphs import bound
from sglang_er.engine.written_shadow import WrittenShadow, longest_context
from sglang_er.kernels import registry
from sglang_er.kernels.base import WEIGHT_DTYPES
from sglang_er.twin.kv_shadow import shadow_format

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_er.config import RolloutConfig
    from sglang_er.engine.cpu.executor import NativeExecutor
    from sglang_er.engine.sampler import DraftedChain, StepSampler
    from sglang_er.kernels.kv_shadow import ShadowFormat
    from sglang_er.twin.kv_shadow import ShadowPool
    from sglang_er.twin.twin import Twin

logger = logging.getLogger(__name__)


class WrappedDrafter:
    """Also the interface: `configure`; `whole_pass`, or else `draft_pass` and `logits`; what `describe_*` tell."""

    def __init__(
        self, runner: ModelRunner, twin: Twin, config: RolloutConfig, memory: SavedMemory, ranks: Ranks = ALONE
    ) -> None:
        self._runner = runner
        self._twin = twin
        self._memory = memory
        self._ranks = ranks
        self._counts: Counter[str] = Counter()
        self._graphs: EagerGraphs | None = None
        self._loop: DraftLoop | None = None
        self._looped: tuple[object, ...] = ()
        self._loop_shadowed = False
        self._shadow: WrittenShadow | None = None
        self._valid: torch.Tensor | None = None
        self.configure(config)

    def configure(self, config: RolloutConfig) -> None:
        """Options changed; the server is idle."""
        device = str(self._runner.device)
        int8 = config.draft_activations == "int8" and (
            device == "cpu" or registry.has_kernel("w4a8_linear", device, self._runner.dtype)
        )
        for layer in self._twin.layers:
            layer.int8_activations = int8
        format = shadow_format(config, device)
        recorded_int8 = int8 and device != "cpu"  # a graph holds the products that it recorded
        looped = (config.draft_graphs, config.graph_memory_mb, config.gamma_max, config.kv_shadow, recorded_int8)
        unforeseen = self._loop is not None and not self._loop_shadowed and self._is_read(format, config.kv_shadow_from)
        if looped != self._looped or unforeseen:  # what was recorded stays otherwise
            self._graphs, self._loop, self._looped = self._make_graphs(config), None, looped
            self._shadow = None
        self._shadow_format, self._shadow_from = format, config.kv_shadow_from
        self._gamma_max = config.gamma_max

    def _make_graphs(self, config: RolloutConfig) -> EagerGraphs | None:
        """Who runs a whole pass; None where it is drafted token by token."""
        on_gpu, choice = str(self._runner.device) != "cpu", graphs.choice(config, str(self._runner.device))
        if choice == "on" and on_gpu:
            if not self._ranks.alone:
                raise ConfigError("draft_graphs is on; passes of several ranks are not recorded: --er-draft-graphs off")
            # Plain torch's attention looks at lengths on the host, and the CUDA one reads the KV shadow only.
            attention = registry.candidates("paged_attention", "cuda", self._runner.dtype)
            if "triton" not in (entry.name for entry in attention):
                raise ConfigError("draft_graphs is on; its attention is Triton's: --er-kernels cuda,triton,reference")
            return CudaGraphs(config.graph_memory_mb << 20, self._memory, self._ranks)
        return EagerGraphs() if choice == "eager" else None

    def whole_pass(
        self, chain: forward.Chain, bonus: torch.Tensor, sampler: StepSampler, context_tokens: int
    ) -> DraftedChain | None:
        """All drafts of a step after `bonus` int64 [B], over so many tokens of context; None where they have to be made
        one by one."""
        rows, gamma = chain.slots.shape[0], chain.slots.shape[1] - 1
        loop = self._whole()
        if loop is None or not loop.takes(rows, gamma):
            return None
        self._counts["draft_loop"] += gamma
        return loop.run(chain, bonus, sampler, shadow=context_tokens >= self._shadow_from)

    def _whole(self) -> DraftLoop | None:
        """Made at first use: the pools exist by then. None for a pool that our attention does not read (fp8)."""
        if self._graphs is None or self._runner.token_to_kv_pool.dtype not in WEIGHT_DTYPES:
            return None
        if self._loop is None:
            self._loop_shadowed = self._is_read(self._shadow_format, self._shadow_from)
            self._shadow = self._make_shadow(self._graphs) if self._loop_shadowed else None
            shadow = None if self._shadow is None else self._shadow.pool
            self._loop = DraftLoop(
                self._runner, self._twin, self._graphs, self._gamma_max, self._memory, self._ranks, shadow
            )
        return self._loop

    def _is_read(self, format: ShadowFormat | None, from_tokens: int) -> bool:
        """Whether any whole pass of this server reads a shadow of these options."""
        if format is None:
            return False
        requests, _ = compat.adapter().request_limits()
        slots = int(self._runner.token_to_kv_pool.k_buffer[0].shape[0])
        return longest_context(self._runner.model_config.context_len, requests, slots) >= from_tokens

    def _make_shadow(self, graphs: EagerGraphs) -> WrittenShadow | None:
        """None, said once, where it cannot be had: on all ranks or on none."""
        shadow, reason = None, "another rank has none"
        try:
            assert self._shadow_format is not None
            with self._memory.region(KV_CACHE):
                if self._valid is None:
                    # Moves are not followed: what they write is read from the pool until a forward writes it again.
                    self._valid = watch_pool(self._runner.token_to_kv_pool, OTHERS)
                pool = shadow_pool(self._runner, self._valid, self._shadow_format)
            shadow = WrittenShadow(pool, graphs)
        except (ValueError, RuntimeError) as error:  # no memory is a RuntimeError, too
            reason = str(error).splitlines()[0]
        if self._ranks.agreed(shadow is not None):
            return shadow
        logger.warning("sglang-er: no KV shadow, drafts read the KV pool itself: %s", reason)
        return None

    def written(self, slots: torch.Tensor | None) -> None:
        """The policy's forward has written KV into these slots, int [n]."""
        if self._shadow is not None and slots is not None and KV_CACHE not in self._memory.away:
            self._shadow.written(slots)

    def forget_kv(self) -> None:
        """The KV pool holds something else now than was quantized: nothing of the shadow may be read."""
        if self._valid is not None:
            self._valid.zero_()

    def record(self, seconds: float) -> None:
        """At start-up: graphs of the passes that are likeliest to be asked for, as many as that time allows."""
        loop = self._whole() if isinstance(self._graphs, CudaGraphs) else None
        if loop is not None:
            loop.record(seconds)

    def draft_pass(self, chain: forward.Chain) -> AbstractContextManager[None]:
        """Around the drafted tokens of one step."""
        del chain
        return self._drafting()

    @contextmanager
    def _drafting(self) -> Iterator[None]:
        # A recorded decode step is the policy's own, whatever the layers are switched to.
        with self._twin.draft_pass(), bound(self._runner, None, None):
            yield

    def logits(self, chain: forward.Chain, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """[B, V] after `tokens` int64 [B] at position committed + step; K and V go to the chain's slot of that step."""
        self._counts["draft_wrapped"] += 1
        return forward.draft_logits(self._runner, chain, step, tokens)

    def forwards(self) -> dict[str, int]:
        """How many forwards took which way since start-up."""
        return dict(self._counts)

    def shadow(self) -> ShadowPool | None:
        """The KV shadow, once there is one."""
        return None if self._shadow is None else self._shadow.pool

    def describe_shadow(self) -> dict[str, object] | None:
        """Its figures; what is released cannot be counted."""
        shadow = self.shadow()
        return None if shadow is None else shadow.describe(count=KV_CACHE not in self._memory.away)

    def graph_nbytes(self) -> int:
        """Bytes of whole passes under the tag cuda_graph."""
        graphs = self._graphs.nbytes if self._graphs is not None and self._memory.holds_graphs else 0
        return graphs + (0 if self._loop is None else self._loop.released_nbytes)

    def describe_graphs(self) -> dict[str, object] | None:
        """Graphs of whole passes, where they are used."""
        return None if self._graphs is None else self._graphs.describe()


class NativeDrafter(WrappedDrafter):
    """The executor's decoder, unless it is switched off."""

    def __init__(
        self, runner: ModelRunner, twin: Twin, config: RolloutConfig, memory: SavedMemory, ranks: Ranks = ALONE
    ) -> None:
        self._executor: NativeExecutor = runner.sglang_er_executor
        self._native = False
        super().__init__(runner, twin, config, memory, ranks)

    def configure(self, config: RolloutConfig) -> None:
        super().configure(config)
        self._executor.configure(config)
        if self._executor.enabled:  # which has a shadow of its own
            self._loop = self._shadow = None

    def whole_pass(
        self, chain: forward.Chain, bonus: torch.Tensor, sampler: StepSampler, context_tokens: int
    ) -> DraftedChain | None:
        # The executor would run the loop's forwards with the policy's weights.
        return None if self._executor.enabled else super().whole_pass(chain, bonus, sampler, context_tokens)

    def draft_pass(self, chain: forward.Chain) -> AbstractContextManager[None]:
        self._native = self._executor.enabled and self._executor.prepare_draft(self._twin, chain)
        return nullcontext() if self._native else super().draft_pass(chain)

    def logits(self, chain: forward.Chain, step: int, tokens: torch.Tensor) -> torch.Tensor:
        if self._native:
            return self._executor.draft_logits(chain, step, tokens)
        return super().logits(chain, step, tokens)

    def forwards(self) -> dict[str, int]:
        return {**super().forwards(), **self._executor.forwards}

    def forget_kv(self) -> None:
        super().forget_kv()
        self._executor.forget_kv()

    def shadow(self) -> ShadowPool | None:
        return self._executor.shadow or super().shadow()


def make_drafter(
    runner: ModelRunner, twin: Twin, config: RolloutConfig, memory: SavedMemory, ranks: Ranks = ALONE
) -> WrappedDrafter:
    """The native one where the runner has an executor (CPU platform, a model that it knows)."""
    if getattr(runner, "sglang_er_executor", None) is None:
        return WrappedDrafter(runner, twin, config, memory, ranks)
    return NativeDrafter(runner, twin, config, memory, ranks)
