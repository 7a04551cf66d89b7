"""Kernels behind one name per op; which implementation computes is the registry's decision (``registry.py``)."""

from __future__ import annotations

from sglang_er.kernels.attention_ops import kv_shadow_store, paged_attention
from sglang_er.kernels.base import PackedWeight
from sglang_er.kernels.chain_ops import verify_chain
from sglang_er.kernels.cpu.loader import LibraryError, isa, library_version, set_isa, supported_isas
from sglang_er.kernels.expert_ops import w4a16_experts
from sglang_er.kernels.formats import layout_for
from sglang_er.kernels.int8_activations import int8_pays
from sglang_er.kernels.kv_shadow import KvShadow
from sglang_er.kernels.marlin_weight import MarlinWeight, QuantizedWeight
from sglang_er.kernels.ops import bf16_linear, dequantize, quantize_pack, w4a8_linear, w4a16_linear
from sglang_er.kernels.registry import active_implementation
from sglang_er.kernels.sampling_ops import choose_seeded, draft_sample, sample_rows, softmax_rows

__all__ = [
    "KvShadow",
    "LibraryError",
    "MarlinWeight",
    "PackedWeight",
    "QuantizedWeight",
    "active_implementation",
    "bf16_linear",
    "choose_seeded",
    "dequantize",
    "draft_sample",
    "int8_pays",
    "isa",
    "kv_shadow_store",
    "layout_for",
    "library_version",
    "paged_attention",
    "quantize_pack",
    "sample_rows",
    "set_isa",
    "softmax_rows",
    "supported_isas",
    "verify_chain",
    "w4a8_linear",
    "w4a16_experts",
    "w4a16_linear",
]
