"""Functions of SGLang that have no platform hook and would launch Triton or sgl_kernel on a CPU.

Each replacement has the contract of the original. Registered through SGLang's HookRegistry, which also rebinds
`from x import y` copies; only when the CPU platform is the active one.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_er import kernels
from sglang_er.config import from_env
from sglang_er.engine import compat
from sglang_er.engine.cpu import executor
from sglang_er.engine.cpu.attention import create_cpu_attention_backend
from sglang_er.engine.cpu.platform import ATTENTION_BACKEND
from sglang_er.kernels.reference.murmur_hash import murmur_hash32
from sglang_er.sampling.chain import sample_rows

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# Decode and verify sizes. Prefill keeps torch's product where that has AVX-512, though ours measured faster up to 512
# rows (docs/kernels.md); without AVX-512 torch multiplies bf16 five times as slowly as we do, at any size.
MAX_STREAMED_ROWS = 64


@functools.cache
def torch_streams_bf16() -> bool:
    """Whether torch has a fast bf16 product on this machine."""
    return str(torch.backends.cpu.get_cpu_capability()) != "AVX2"


def register() -> None:
    """Register the attention backend's name and every replacement (idempotence is the caller's business)."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS[ATTENTION_BACKEND] = create_cpu_attention_backend

    adapter = compat.adapter()
    adapter.allow_attention_backend(ATTENTION_BACKEND)
    adapter.register_cpu_hooks()
    replace = {
        adapter.write_slots: assign_req_to_token_pool,
        adapter.seeded_hash: murmur_hash32,
        "sglang.srt.batch_invariant_ops.batch_invariant_ops.enable_batch_invariant_mode": enable_batch_invariant_mode,
    }
    for target, function in replace.items():
        HookRegistry.register(target, function, HookType.REPLACE)
    if not torch.accelerator.is_available():
        HookRegistry.register("torch.get_device_module", get_device_module, HookType.AROUND)
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    HookRegistry.register(f"{runner}.load_model", install_executor, HookType.AFTER)
    unquantized = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"
    HookRegistry.register(f"{unquantized}.apply", apply_linear, HookType.AROUND)
    processor = "sglang.srt.layers.logits_processor.LogitsProcessor"
    HookRegistry.register(f"{processor}._compute_lm_head", compute_lm_head, HookType.AROUND)
    HookRegistry.register("sglang.srt.layers.sampler.sampling_from_probs_torch", sample_from_probs, HookType.AROUND)
    HookRegistry.register("sglang.srt.utils.common.support_triton", support_triton, HookType.AROUND)
    HookRegistry.register(adapter.last_slot, get_last_loc, HookType.AROUND)
    if adapter.bind_threads is not None:
        HookRegistry.register(adapter.bind_threads, init_threads_binding, HookType.AROUND)


def get_device_module(original: Callable[..., Any], device: Any = None) -> Any:
    """A torch built for CUDA names torch.cuda where there is no GPU either, whose `synchronize` ends the scheduler when
    memory is released."""
    return torch.cpu if device is None else original(device)


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """req_to_token[r, start:end] = the next (end - start) slots of out_cache_loc, request after request.

    Raises RuntimeError when a row is too narrow: upstream's kernel would write into the next request's row.
    """
    rows = req_pool_indices[:batch_size].tolist()
    taken = 0
    for row, start, end in zip(rows, start_offset.tolist(), end_offset.tolist(), strict=True):
        if end > req_to_token.shape[1]:
            raise RuntimeError(f"req_to_token row of {req_to_token.shape[1]} slots cannot hold position {end - 1}")
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def install_executor(result: Any, runner: ModelRunner, *_: Any, **__: Any) -> Any:
    """Every server gets it, with speculation or without: plain decode must be as fast as we can make it."""
    config = from_env()
    runner.sglang_er_executor = None
    executor.configure_kernels(config)
    if config.own_kernels:
        executor.install(runner, config)
    return result


def apply_linear(
    original: Callable[..., torch.Tensor],
    method: UnquantizedLinearMethod,
    layer: torch.nn.Module,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer of few tokens streams its weight; torch's bf16 linear does that at half of memory's speed, or a
    fifth of the arithmetic's."""
    if not executor.own_kernels or x.dim() != 2 or layer.weight.dim() != 2:
        return original(method, layer, x, bias)
    if x.shape[0] > MAX_STREAMED_ROWS and (layer.weight.dtype != torch.bfloat16 or torch_streams_bf16()):
        return original(method, layer, x, bias)
    return kernels.bf16_linear(x, layer.weight.data, bias)


def compute_lm_head(
    original: Callable[..., torch.Tensor],
    processor: LogitsProcessor,
    hidden_states: torch.Tensor,
    lm_head: torch.nn.Module,
    embedding_bias: torch.Tensor | None = None,
    **buffer: Any,
) -> torch.Tensor:
    """Logits by one kernel whatever the number of rows, so that a row of a wide verify pass gets those of a decode
    step, bit for bit. fp32 hidden states (the native executor's) give fp32 logits. `buffer`: where 0.5.23 would like
    them, which it does not rely on."""
    weight = getattr(lm_head, "weight", None)
    plain = embedding_bias is None and not hasattr(lm_head, "set_lora")
    if weight is None or not plain or not executor.own_kernels:
        return original(processor, hidden_states, lm_head, embedding_bias, **buffer)
    return kernels.bf16_linear(hidden_states, weight.data)


def sample_from_probs(
    original: Callable[..., torch.Tensor],
    probs: torch.Tensor,
    sampling_seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """One draw a row, int32 [R]. torch.multinomial takes most of a plain step of 32 requests with a vocabulary of
    150,000 (docs/decisions.md)."""
    if sampling_seed is not None or probs.dtype != torch.float32 or not executor.own_kernels:
        return original(probs, sampling_seed=sampling_seed, positions=positions)
    return sample_rows(probs).to(torch.int32)


def support_triton(original: Callable[[str], bool], backend: str) -> bool:
    return backend != ATTENTION_BACKEND and original(backend)


def get_last_loc(
    original: Callable[..., torch.Tensor],
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
) -> torch.Tensor:
    """Slot of the last prefix token of every request, -1 without a prefix (the original launches Triton)."""
    del original
    last = req_to_token[req_pool_indices, prefix_lens - 1]
    return torch.where(prefix_lens > 0, last, torch.full_like(prefix_lens, -1))


def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
    """Deterministic inference on a CPU: seeds are honoured, but the Triton kernels that make every sum independent of
    the batch size do not exist here (the original refuses to start without an accelerator)."""
    del enable_bmm
    logger.warning("sglang-er: on CPU deterministic inference means seeded sampling; logits may differ by rounding")


def init_threads_binding(original: Callable[..., str], *, numa_index: int, world_size: int) -> str:
    """Cores of this rank. The original refuses more engines than NUMA nodes; here they share all cores, unless
    SGLANG_CPU_OMP_THREADS_BIND divides them."""
    from sglang.srt.utils.numa_utils import get_cpu_ids_by_node

    nodes = get_cpu_ids_by_node()
    if world_size <= len(nodes) or os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "all") != "all":
        return original(numa_index=numa_index, world_size=world_size)
    logger.warning(
        "sglang-er: %d engines share the cores of %d NUMA node(s): set --er-cpu-threads to cores / engines",
        world_size,
        len(nodes),
    )
    return ",".join(nodes)
