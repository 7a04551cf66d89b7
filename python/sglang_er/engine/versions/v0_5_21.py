"""SGLang 0.5.21: a sealed record of arguments read through bags, weight update sessions, one list of runners."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from sglang_er.engine.versions.base import Adapter
from sglang_er.engine.weight_watch import WatchedWeightUpdater

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"


class Sglang0521(Adapter):
    versions = ("0.5.21",)
    required = (
        "sglang.srt.speculative.spec_registry:CustomSpecAlgo",
        "sglang.srt.speculative.base_spec_worker:BaseSpecWorker.weight_update_runners",
        "sglang.srt.speculative.spec_info:SpecInput",
        "sglang.srt.speculative.eagle_utils:eagle_prepare_for_decode",
        "sglang.srt.managers.overlap_utils:FutureMap._resolve_spec_extras",
        "sglang.srt.managers.scheduler:Scheduler.get_internal_state",
        "sglang.srt.managers.scheduler:Scheduler.set_internal_state",
        "sglang.srt.managers.scheduler:Scheduler.is_fully_idle",
        "sglang.srt.managers.scheduler:Scheduler.get_next_batch_to_run",
        "sglang.srt.managers.scheduler:Scheduler.process_batch_result",
        "sglang.srt.constrained.grammar_manager:GrammarManager.has_waiting_grammars",
        "sglang.srt.managers.utils:GenerationBatchResult",
        "sglang.srt.managers.utils:compute_num_reserved_tokens",
        "sglang.srt.mem_cache.allocation_sizing:get_req_to_token_extra_context_len",
        "sglang.srt.mem_cache.allocation_sizing:get_alloc_reserve_per_decode",
        "sglang.srt.distributed:get_tp_group",
        "sglang.srt.model_executor.pool_configurator:DefaultPoolConfigurator._compute_cell_size",
        "sglang.srt.layers.linear:LinearBase",
        "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
        "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head",
        "sglang.srt.layers.logprob_processor:compute_spec_logprobs",
        "sglang.srt.layers.sampler:multinomial_with_seed",
        "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
        "sglang.srt.layers.sampler:sampling_from_probs_torch",
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
        "sglang.srt.managers.scheduler:Scheduler.continue_generation",
        f"{_UPDATER}.begin_weight_update",
        f"{_UPDATER}.end_weight_update",
        f"{_UPDATER}.update_weights_from_tensor",
        f"{_UPDATER}.release_memory_occupation",
        f"{_UPDATER}.resume_memory_occupation",
        "sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.region",
        "sglang.srt.utils.torch_memory_saver_adapter:TorchMemorySaverAdapter.cuda_graph",
        "sglang.srt.environ:envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH",
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._calculate_spec_decoding_metrics",
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.update_request_meta_info",
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_abort_req",
        "sglang.srt.managers.auxiliary_output:append_auxiliary_output",
        "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"
        ".consume_auxiliary_output",
        "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.release_memory_occupation",
    )

    row_headroom = "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len"
    write_slots = "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"
    last_slot = "sglang.srt.mem_cache.allocation.get_last_loc"
    seeded_hash = "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32"
    bind_threads = "sglang.srt.utils.numa_utils.init_threads_binding"

    def register_hooks(self) -> None:
        """None: `hooks.py` has all."""

    def register_cpu_hooks(self) -> None:
        """None: `cpu/patches.py` has all."""

    def resolve(self, server_args: Any) -> None:
        server_args.resolve_once()

    def model_config(self, server_args: Any) -> Any:
        from sglang.srt.arg_groups.model_override_base import model_config_of

        # The validator gets a recording stand-in; the view underneath is what the model config is built from.
        return model_config_of(object.__getattribute__(server_args, "_cfg"))

    def has_recurrent_layers(self, model_config: Any) -> bool:
        from sglang.srt.configs import hybrid_arch

        probes = ("mambaish_config", "hybrid_gdn_config", "kimi_linear_config", "hybrid_lightning_config")
        for probe in probes:
            function = getattr(hybrid_arch, probe, None)
            try:
                if function is not None and function(model_config) is not None:
                    return True
            except (AttributeError, TypeError):
                continue
        return False

    def served_algorithm(self) -> str | None:
        from sglang.srt.runtime_context import get_spec

        algorithm: str | None = get_spec().speculative_algorithm
        return algorithm

    def deterministic(self) -> bool:
        from sglang.srt.runtime_context import get_exec

        return bool(get_exec().deterministic.enable_deterministic_inference)

    records_graphs = True

    def decode_graphs(self) -> list[int]:
        from sglang.srt.model_executor.cuda_graph_config import Backend
        from sglang.srt.runtime_context import get_exec

        decode = get_exec().graph.cuda_graph_config.decode
        return [] if decode.backend == Backend.DISABLED else list(decode.bs or ())

    def weight_version(self, tokenizer_manager: Any) -> Any:
        return tokenizer_manager.config_value("weight_version")

    def allow_attention_backend(self, name: str) -> None:
        from sglang.srt.arg_groups import choices

        for known in (
            choices.ATTENTION_BACKEND_CHOICES,
            choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
            choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
        ):
            if name not in known:
                known.append(name)

    def row_reserve(self) -> int:
        from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size, get_alloc_reserve_per_decode

        return int(get_alloc_reserve_per_decode() + get_alloc_page_size() - 1)

    def ranks(self, runner: Any) -> tuple[int, int | None]:
        return runner.tp_rank, runner.dp_rank

    def shards(self, linear: Any) -> int:
        return int(linear.tp_size)

    def request_limits(self) -> tuple[int | None, int | None]:
        from sglang.srt.runtime_context import get_schedule

        schedule = get_schedule()
        return schedule.max_running_requests, schedule.max_total_tokens

    def spec_input_types(self) -> tuple[Any, Any]:
        from sglang.srt.speculative.spec_info import SpecInputType

        # SGLang's own shared-runner algorithm: state without draft KV, a verify pass of a fixed width.
        return SpecInputType.UNO_STATE, SpecInputType.UNO_VERIFY

    def verify_width(self, runner: Any, width: int) -> AbstractContextManager[None]:
        from sglang.srt.runtime_context import get_spec

        del runner
        override: AbstractContextManager[None] = get_spec().override(
            speculative_num_steps=width - 1, speculative_eagle_topk=1, speculative_num_draft_tokens=width
        )
        return override

    def forget_read_event(self, runner: Any) -> None:
        runner.shared_read_done_event = None

    def compute_logprobs(self, batch: Any, output: Any, tokens: torch.Tensor, width: int) -> None:
        from sglang.srt.layers.logprob_processor import compute_spec_logprobs

        compute_spec_logprobs(batch, output, tokens, chain_stride=width)

    has_sessions = True
    has_auxiliary_output = True

    def worker_base(self) -> type:
        from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

        base: type = BaseSpecWorker
        return base

    def watch_weights(self, runner: Any, changed: Callable[[], None]) -> WatchedWeightUpdater:
        watch = WatchedWeightUpdater(runner.weight_updater, changed)
        runner.weight_updater = watch
        return watch

    def is_idle(self, updater: Any) -> bool:
        # What waits while generation is paused does not count.
        paused = updater.scheduler is not None and updater.scheduler._engine_paused
        return bool(updater.is_fully_idle(ignore_waiting=paused))

    def settle(self, updater: Any) -> None:
        scheduler = updater.scheduler
        if scheduler is None or scheduler.waiting_queue or scheduler.chunked_req is not None:
            return
        if scheduler.grammar_manager.has_waiting_grammars():  # who is done waiting would be scheduled below
            return
        running, last = scheduler.running_batch, scheduler.last_batch
        held = [req for batch in (running, last) if batch is not None for req in batch.reqs]
        if not held or not all(req.finished() for req in held):  # the same on every rank
            return
        # What the scheduler's loop does next, which finds nothing to run.
        scheduler.running_batch = scheduler.get_next_batch_to_run(running_batch=running, last_batch=last).running_batch
        while scheduler.enable_overlap and scheduler.result_queue:
            scheduler.process_batch_result(*scheduler.result_queue.popleft())
        scheduler.last_batch = None

    def state_request_done(self, updated: bool) -> Any:
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        return SetInternalStateReqOutput(updated=updated)
