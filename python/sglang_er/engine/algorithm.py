"""The algorithm EFFICIENT_ROLLOUT as SGLang's registry sees it: argument checks, defaults, and the worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_er.config import ConfigError, RolloutConfig, from_env
from sglang_er.engine import compat, identity
from sglang_er.engine.shards import check_model
from sglang_er.engine.target_attention import CHOICE, SUPPORTED
from sglang_er.kernels import proven
from sglang_er.policy import cost_file
from sglang_er.twin.kv_shadow import check_shadow

ALGORITHM = "EFFICIENT_ROLLOUT"

# flag, value that is fine, what to change
_UNSUPPORTED_FLAGS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("enable_lora", (None, False), "LoRA is not supported: merge the adapter into the weights and drop --enable-lora"),
    ("lora_paths", (None, [], ()), "LoRA is not supported: merge the adapter into the weights and drop --lora-paths"),
    ("pp_size", (1,), "pipeline parallelism is not supported: use --pp-size 1"),
    ("enable_dp_attention", (False,), "DP attention is not supported: drop --enable-dp-attention"),
    ("disaggregation_mode", ("null", None), "PD disaggregation is not supported: drop --disaggregation-mode"),
    ("enable_two_batch_overlap", (False,), "two-batch overlap is not supported: drop --enable-two-batch-overlap"),
    ("enable_single_batch_overlap", (False,), "drop --enable-single-batch-overlap: it is not supported"),
    ("enable_pdmux", (False,), "PD multiplexing is not supported: drop --enable-pdmux"),
    ("enable_return_hidden_states", (False,), "hidden states are not supported: drop --enable-return-hidden-states"),
    ("quantization", (None,), "the target must be unquantized (the twin is made from it): drop --quantization"),
    ("rl_on_policy_target", (None,), "drop --rl-on-policy-target: its bf16 sampling is not reproduced exactly"),
    ("dllm_algorithm", (None,), "diffusion language models are not supported: drop --dllm-algorithm"),
    ("enable_torch_compile", (False,), "drop --enable-torch-compile: the draft switch must stay visible to Python"),
    (
        "speculative_draft_model_path",
        (None,),
        "the drafter is made from the target: drop --speculative-draft-model-path",
    ),
    ("weight_cache_mode", ("off", None), "a shared weight cache refuses weight updates: use --weight-cache-mode off"),
    ("enable_hisparse", (False,), "sparse host KV is not supported: drop --enable-hisparse"),
    ("attn_cp_size", (1, None), "context parallelism is not supported: use --attn-cp-size 1"),
    ("dcp_size", (1, None), "context parallelism is not supported: use --dcp-size 1"),
)


class EfficientRolloutAlgo(CustomSpecAlgo):
    """Duck-types SGLang's enum member; the three members marked below are called though the base lacks them."""

    def has_draft_kv(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:  # scheduler, disaggregation set-up
        return False

    def need_topk(self) -> bool:  # FutureMap
        return False

    def create_future_map(self, device: Any, req_to_token_pool: Any, *args: Any, **kwargs: Any) -> Any:  # scheduler
        from sglang_er.engine.future_map import make_future_map

        return make_future_map(device, self, req_to_token_pool, *args, **kwargs)

    def handle_server_args(self, server_args: Any) -> None:
        config = from_env()
        server_args.speculative_num_steps = config.gamma_max
        server_args.speculative_eagle_topk = 1
        # Never None: processes without the plugin read the memoized width.
        server_args.speculative_num_draft_tokens = config.gamma_max + 1
        server_args.enable_mixed_chunk = False


def validate_server_args(server_args: Any) -> None:
    """Refuse, in one line and before weights are loaded, what would not be exact or not work."""
    compat.require_supported_version()
    config = from_env()
    check_shadow(config, getattr(server_args, "device", "cpu"))
    _validate_gpu(server_args, config)
    for name, fine, advice in _UNSUPPORTED_FLAGS:
        if getattr(server_args, name, fine[0]) not in fine:
            raise ConfigError(f"{ALGORITHM}: {advice}")
    _validate_model(server_args, config)
    _validate_costs(server_args, config)


def _validate_gpu(server_args: Any, config: RolloutConfig) -> None:
    if getattr(server_args, "device", "cpu") == "cpu":
        return
    backends = [getattr(server_args, f"{phase}attention_backend", None) for phase in ("", "prefill_", "decode_")]
    named = {backend for backend in backends if backend is not None}
    # None was seen correct on a GPU yet: SGLang's own choice is not ours, it has to be asked for.
    if not named or not named <= set(SUPPORTED):
        raise ConfigError(f"{ALGORITHM}: verify passes of every length need {CHOICE} on a GPU")
    if getattr(server_args, "disable_cuda_graph", False):
        return
    saves_graphs = os.environ.get("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "").lower() in ("1", "true")
    if saves_graphs and getattr(server_args, "enable_memory_saver", False):
        choices = ("disable_prefill_cuda_graph", "cuda_graph_backend_prefill")
        if not any(getattr(server_args, choice, None) for choice in choices):
            # The kind of prefill graphs that SGLang takes by itself ends the server, once the weights are loaded.
            raise ConfigError(f"{ALGORITHM}: SGLANG_MEMORY_SAVER_CUDA_GRAPH needs --disable-prefill-cuda-graph")
    if config.draft_graphs == "on" and int(getattr(server_args, "tp_size", 1)) > 1:
        raise ConfigError(f"{ALGORITHM}: draft passes of several ranks are not recorded: --er-draft-graphs off")
    if not compat.adapter().records_graphs:
        raise ConfigError(f"{ALGORITHM}: no CUDA graphs with SGLang {compat.installed_sglang()}: --disable-cuda-graph")
    if config.draft_graphs == "auto" and not proven.DRAFT_GRAPHS:
        raise ConfigError(
            f"{ALGORITHM}: its CUDA graphs were not seen correct on a GPU yet (docs/gpu-status.md): add "
            "--disable-cuda-graph, or --er-draft-graphs on --er-kernels cuda,triton,reference to try them (off with "
            "--tp-size above 1)"
        )


def _validate_model(server_args: Any, config: RolloutConfig) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    adapter = compat.adapter()
    model = adapter.model_config(server_args)
    architecture = (model.hf_config.architectures or ["unknown"])[0]
    layer_types = getattr(model.hf_config, "layer_types", None) or ()
    recurrent = any("linear" in kind or "mamba" in kind for kind in layer_types)
    problem = None
    if model.attention_arch != AttentionArch.MHA:
        problem = f"{model.attention_arch.name} attention"
    elif model.is_multimodal:
        problem = "multimodal input"
    elif model.is_encoder_decoder:
        problem = "encoder-decoder attention"
    elif getattr(model.hf_config, "quantization_config", None) is not None:
        problem = "already quantized weights (the twin is made from unquantized ones)"
    elif recurrent or adapter.has_recurrent_layers(model):
        problem = "recurrent or linear-attention layers (a draft would change their state)"
    elif getattr(model, "is_hybrid_swa", False):
        problem = "a hybrid sliding-window KV pool"
    if problem:
        raise ConfigError(
            f"{ALGORITHM}: {architecture} has {problem}, which is not supported: serve it with --plain, or choose a "
            "Llama, Qwen2, Qwen3 or Mistral model"
        )
    try:
        check_model(model.hf_text_config, model.head_dim, int(getattr(server_args, "tp_size", 1)), config.group_size)
    except ConfigError as error:
        raise ConfigError(f"{ALGORITHM}: {error}") from None


def _validate_costs(server_args: Any, config: RolloutConfig) -> None:
    """A file of costs is looked at again once the engine is there; what can be told before that is told in one line."""
    if config.cost_file is None:
        return
    device = str(getattr(server_args, "device", "cpu"))
    on_cpu = device == "cpu"
    here = identity.known_before(
        compat.adapter().model_config(server_args),
        device if on_cpu else f"{device}:{getattr(server_args, 'base_gpu_id', 0)}",
        int(server_args.tp_size),
        config.cpu_threads if on_cpu else None,
    )
    try:
        cost_file.load(Path(config.cost_file), here)
    except cost_file.StaleCosts as error:
        raise ConfigError(f"{ALGORITHM}: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"{ALGORITHM}: {config.cost_file}: cannot read the file of costs: {error.strerror}; give --er-cost-file a "
            "file of `sglang-er calibrate`, or leave it out"
        ) from None


def register_algorithm() -> None:
    """Make the name resolve in this process; calling it again does nothing."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import get_spec

    if get_spec(ALGORITHM) is not None:
        return

    @SpeculativeAlgorithm.register(
        ALGORITHM, supports_overlap=True, validate_server_args=validate_server_args, spec_class=EfficientRolloutAlgo
    )
    def _worker(server_args: Any) -> type:
        compat.require_private_api()
        from sglang_er.engine.worker import EfficientRolloutWorker

        return EfficientRolloutWorker
