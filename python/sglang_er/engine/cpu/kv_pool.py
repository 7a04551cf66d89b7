"""SGLang's MHA pool without the Triton kernel that moves slots, which 0.5.23 warms up for every speculative server.

Earlier versions ask the platform for the class by another name, and warm up nothing there.
"""

from __future__ import annotations

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class CpuKvPool(MHATokenToKVPool):
    def _init_kv_copy_and_warmup(self) -> None:
        self.use_native_move_kv_cache = True
        self._kv_copy_config = None
