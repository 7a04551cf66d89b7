"""SGLang platform plugin for x86-64 CPUs (entry point group `sglang.srt.platforms`).

SGLang asks the platform for its KV pool, slot allocator and defaults; everything that has no platform hook is
replaced in `patches.py`. Nothing here is active unless this platform was selected.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_er.engine import compat

logger = logging.getLogger(__name__)

ATTENTION_BACKEND = "sglang_er_cpu"
# What SGLang itself puts in place when the user asked for no backend on a CPU.
_STOCK_CPU_BACKENDS = ("intel_amx", "torch_native")
# SGLang would take about 70 % of all RAM as KV pool. 16k tokens are 1.9 GB for a Qwen3-0.6B, 2.4 GB for an 8B.
DEFAULT_MAX_TOTAL_TOKENS = 16384


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Text models on a plain CPU: torch kernels, our attention backend, paged slots without Triton."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args) -> None:  # type: ignore[no-untyped-def]
        """Fill in what the user left open; an explicit flag always wins."""
        # Here too, because frameworks resolve their arguments without loading any plugin.
        compat.adapter().allow_attention_backend(ATTENTION_BACKEND)
        if server_args.attention_backend in (None, *_STOCK_CPU_BACKENDS):
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        # No graph capture exists here; leaving it enabled only prints warnings and sizes buffers for it.
        server_args.disable_cuda_graph = True

    def get_device(self, local_rank: int = 0) -> str:  # type: ignore[override]
        # Resolving --device splits this at a colon: an out-of-tree platform has to answer with a string.
        return "cpu"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        """Without it `POST /start_profile` ends the scheduler."""
        import torch

        return torch.profiler.ProfilerActivity.CPU

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        raise RuntimeError("sglang-er: MLA models are not supported on the CPU platform; use a GQA/MHA model")

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """0.5.23's in place of the two above, asked for every kind in advance: None is SGLang's own."""
        if kind != "mha":
            return None
        from sglang_er.engine.cpu.kv_pool import CpuKvPool

        return CpuKvPool

    def get_paged_allocator_cls(self) -> type:
        from sglang_er.engine.cpu.allocator import CpuPagedAllocator

        return CpuPagedAllocator

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def init_backend(self) -> None:
        """Called once in every process that runs a model, before the model is built."""
        import torch

        # SGLang decorates small sampling helpers with torch.compile; the first use would stop the scheduler for
        # a minute or two while inductor runs the C++ compiler.
        torch._dynamo.config.disable = True
        threads = os.environ.get("SGLANG_ER_CPU_THREADS")
        if threads:
            torch.set_num_threads(int(threads))
