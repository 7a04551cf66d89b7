"""Which SGLang this plugin was written against, checked at start-up: a private API that moved must not fail later."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

SUPPORTED_SGLANG = ("0.5.21",)

# Everything private that the engine room relies on: "module:attribute.path".
REQUIRED = (
    "sglang.srt.speculative.spec_registry:CustomSpecAlgo",
    "sglang.srt.speculative.base_spec_worker:BaseSpecWorker.weight_update_runners",
    "sglang.srt.speculative.spec_info:SpecInput",
    "sglang.srt.speculative.eagle_utils:eagle_prepare_for_decode",
    "sglang.srt.managers.overlap_utils:FutureMap._resolve_spec_extras",
    "sglang.srt.managers.scheduler:Scheduler.get_internal_state",
    "sglang.srt.managers.scheduler:Scheduler.set_internal_state",
    "sglang.srt.managers.scheduler:Scheduler.is_fully_idle",
    "sglang.srt.managers.utils:GenerationBatchResult",
    "sglang.srt.managers.utils:compute_num_reserved_tokens",
    "sglang.srt.mem_cache.allocation_sizing:get_req_to_token_extra_context_len",
    "sglang.srt.mem_cache.allocation_sizing:get_alloc_reserve_per_decode",
    "sglang.srt.layers.linear:LinearBase",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head",
    "sglang.srt.layers.logprob_processor:compute_spec_logprobs",
    "sglang.srt.layers.sampler:multinomial_with_seed",
    "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
    "sglang.srt.layers.sampler:sampling_from_probs_torch",
    "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    "sglang.srt.managers.scheduler:Scheduler.continue_generation",
    "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.begin_weight_update",
    "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.end_weight_update",
    "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.update_weights_from_tensor",
    "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.release_memory_occupation",
    "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.resume_memory_occupation",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._calculate_spec_decoding_metrics",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.update_request_meta_info",
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_abort_req",
    "sglang.srt.managers.auxiliary_output:append_auxiliary_output",
    "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"
    ".consume_auxiliary_output",
    "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.release_memory_occupation",
)


class UnsupportedSGLang(RuntimeError):
    """The installed SGLang is not one that this version of sglang-er knows."""


def installed_sglang() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "not installed"


def require_supported_version() -> None:
    """Raises UnsupportedSGLang with one line that names both versions."""
    found = installed_sglang()
    if found not in SUPPORTED_SGLANG:
        raise UnsupportedSGLang(
            f"sglang-er supports SGLang {', '.join(SUPPORTED_SGLANG)} but {found} is installed: "
            f"pip install sglang=={SUPPORTED_SGLANG[-1]}, or a release of sglang-er for {found}"
        )


def require_private_api() -> None:
    """Raises UnsupportedSGLang naming every private name that is gone (a patched or repackaged SGLang)."""
    missing = []
    for entry in REQUIRED:
        module_name, _, path = entry.partition(":")
        try:
            target: object = importlib.import_module(module_name)
            for part in path.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError):
            missing.append(entry)
    if missing:
        raise UnsupportedSGLang(
            f"sglang-er relies on private names that SGLang {installed_sglang()} lacks here: {', '.join(missing)}; "
            f"install an unmodified sglang=={SUPPORTED_SGLANG[-1]}"
        )
