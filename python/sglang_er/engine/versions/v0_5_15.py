"""SGLang 0.5.15.post1, slime's base: plain arguments, no weight update sessions, updates told to the worker itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_er.engine.versions.base import Adapter

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"

# Methods of ModelRunner that write weights.
WRITERS = (
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
)


class TargetUpdates:
    """What this version's base class leaves to a worker, and what the scheduler asks of it at a weight update.

    The draft has no weights of its own.
    """

    _target_worker: Any

    @property
    def target_worker(self) -> Any:
        return self._target_worker

    def update_weights_from_tensor(self, request: Any) -> tuple[bool, str]:
        """Asked *instead of* the target's worker: without this the policy would never change."""
        result: tuple[bool, str] = self._target_worker.update_weights_from_tensor(request)
        return result

    def update_weights_from_disk(self, request: Any) -> tuple[bool, str]:
        """Asked after the target's worker, whose reply this one replaces."""
        del request
        return True, "Succeeded to update model weights."

    def update_weights_from_ipc(self, request: Any) -> tuple[bool, str]:
        """As from disk."""
        del request
        return True, "IPC weight update completed successfully"


def no_draft_pool(original: Callable[..., Any], *, draft_worker: Any, **rest: Any) -> Any:
    """The scheduler looks for the draft's KV pool on every worker but its own n-gram one; ours has none."""
    return None if isinstance(draft_worker, TargetUpdates) else original(draft_worker=draft_worker, **rest)


def apply_grammar_mask(
    original: Callable[..., None], grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor
) -> None:
    """Later versions mask the logits of a CPU too; this one ends the scheduler."""
    if logits.device.type != "cpu":
        original(grammar, logits, vocab_mask)
        return
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


class RunnerWatch:
    """Wraps the writers of one model runner; `changed()` after each call, a failed one too."""

    session_open = False

    def __init__(self, runner: Any, changed: Callable[[], None]) -> None:
        missing = sorted(name for name in WRITERS if not callable(getattr(runner, name, None)))
        if missing:
            raise RuntimeError(f"sglang-er: SGLang's model runner lacks {', '.join(missing)}: unsupported version")
        for name in WRITERS:
            setattr(runner, name, _followed_by(getattr(runner, name), changed))


def _followed_by(write: Callable[..., Any], changed: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return write(*args, **kwargs)
        finally:
            changed()

    return call


class Sglang0515(Adapter):
    versions = ("0.5.15.post1",)
    required = (
        "sglang.srt.speculative.spec_registry:CustomSpecAlgo",
        "sglang.srt.speculative.base_spec_worker:BaseSpecWorker.on_verify_complete_cpu",
        "sglang.srt.speculative.spec_info:SpecInput",
        "sglang.srt.speculative.eagle_utils:eagle_prepare_for_decode",
        "sglang.srt.managers.overlap_utils:FutureMap._resolve_spec_extras",
        "sglang.srt.managers.scheduler:Scheduler.get_internal_state",
        "sglang.srt.managers.scheduler:Scheduler.set_internal_state",
        "sglang.srt.managers.scheduler:Scheduler.is_fully_idle",
        "sglang.srt.managers.scheduler:Scheduler.continue_generation",
        "sglang.srt.managers.utils:GenerationBatchResult",
        "sglang.srt.mem_cache.common:get_req_to_token_extra_context_len",
        "sglang.srt.mem_cache.common:get_alloc_reserve_per_decode",
        "sglang.srt.mem_cache.kv_cache_builder:get_draft_kv_pool",
        "sglang.srt.distributed:get_tp_group",
        "sglang.srt.model_executor.pool_configurator:DefaultPoolConfigurator._compute_cell_size",
        "sglang.srt.layers.linear:LinearBase",
        "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
        "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head",
        "sglang.srt.layers.utils.logprob:compute_spec_v2_logprobs",
        "sglang.srt.layers.sampler:multinomial_with_seed",
        "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
        "sglang.srt.layers.sampler:sampling_from_probs_torch",
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
        *(f"{_RUNNER}.{name}" for name in WRITERS),
        f"{_UPDATER}.update_weights_from_tensor",
        f"{_UPDATER}.release_memory_occupation",
        f"{_UPDATER}.resume_memory_occupation",
        "sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.region",
        "sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.cuda_graph",
        "sglang.srt.environ:envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH",
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._calculate_spec_decoding_metrics",
        "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.release_memory_occupation",
    )

    row_headroom = "sglang.srt.mem_cache.common.get_req_to_token_extra_context_len"
    write_slots = "sglang.srt.speculative.triton_ops.cache_locs.assign_req_to_token_pool_func"
    last_slot = "sglang.srt.mem_cache.common.get_last_loc"
    seeded_hash = "sglang.srt.layers.utils.hash.murmur_hash32"
    bind_threads = None
    has_sessions = False
    has_auxiliary_output = False

    def register_hooks(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.mem_cache.kv_cache_builder.get_draft_kv_pool", no_draft_pool, HookType.AROUND)

    def register_cpu_hooks(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        mask = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask"
        HookRegistry.register(mask, apply_grammar_mask, HookType.AROUND)

    def resolve(self, server_args: Any) -> None:
        """ServerArgs resolves itself when it is made."""

    def model_config(self, server_args: Any) -> Any:
        return server_args.get_model_config()

    def has_recurrent_layers(self, model_config: Any) -> bool:
        # Every such configuration tells the size of its state by this name.
        return hasattr(type(model_config.hf_text_config), "mamba2_cache_params")

    def served_algorithm(self) -> str | None:
        from sglang.srt.runtime_context import get_server_args

        algorithm: str | None = get_server_args().speculative_algorithm
        return algorithm

    def deterministic(self) -> bool:
        from sglang.srt.runtime_context import get_server_args

        return bool(get_server_args().enable_deterministic_inference)

    records_graphs = False

    def decode_graphs(self) -> list[int]:
        return []

    def weight_version(self, tokenizer_manager: Any) -> Any:
        return tokenizer_manager.server_args.weight_version

    def allow_attention_backend(self, name: str) -> None:
        from sglang.srt import server_args

        for known in (
            server_args.ATTENTION_BACKEND_CHOICES,
            server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            server_args.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
        ):
            if name not in known:
                known.append(name)

    def row_reserve(self) -> int:
        from sglang.srt.mem_cache.common import get_alloc_reserve_per_decode
        from sglang.srt.runtime_context import get_server_args

        return int(get_alloc_reserve_per_decode() + get_server_args().page_size - 1)

    def ranks(self, runner: Any) -> tuple[int, int | None]:
        return runner.tp_rank, runner.dp_rank

    def shards(self, linear: Any) -> int:
        return int(linear.tp_size)

    def request_limits(self) -> tuple[int | None, int | None]:
        from sglang.srt.runtime_context import get_server_args

        arguments = get_server_args()
        return arguments.max_running_requests, arguments.max_total_tokens

    def spec_input_types(self) -> tuple[Any, Any]:
        from sglang.srt.speculative.spec_info import SpecInputType

        return SpecInputType.EAGLE_DRAFT, SpecInputType.EAGLE_VERIFY

    @contextmanager
    def verify_width(self, runner: Any, width: int) -> Iterator[None]:
        arguments = runner.server_args
        before = arguments.speculative_num_steps, arguments.speculative_num_draft_tokens
        arguments.speculative_num_steps, arguments.speculative_num_draft_tokens = width - 1, width
        try:
            yield
        finally:
            arguments.speculative_num_steps, arguments.speculative_num_draft_tokens = before

    def forget_read_event(self, runner: Any) -> None:
        runner.war_fastpath_read_done_event = None

    def compute_logprobs(self, batch: Any, output: Any, tokens: torch.Tensor, width: int) -> None:
        from sglang.srt.layers.utils.logprob import compute_spec_v2_logprobs

        # The row of a chain's token is its own index.
        given = {"accept_index": torch.arange(len(tokens), device=tokens.device), "speculative_num_steps": width - 1}
        if "accept_lens" in inspect.signature(compute_spec_v2_logprobs).parameters:  # slime's patch
            given["accept_lens"] = torch.full((len(tokens) // width,), width, dtype=torch.int32, device=tokens.device)
        compute_spec_v2_logprobs(batch, output, tokens, **given)

    def worker_base(self) -> type:
        from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

        class Worker(TargetUpdates, BaseSpecWorker):  # type: ignore[misc, valid-type]
            pass

        return Worker

    def watch_weights(self, runner: Any, changed: Callable[[], None]) -> RunnerWatch:
        return RunnerWatch(runner, changed)

    def is_idle(self, updater: Any) -> bool:
        return bool(updater.is_fully_idle())

    def state_request_done(self, updated: bool) -> Any:
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        return SetInternalStateReqOutput(updated=updated, server_args={})
