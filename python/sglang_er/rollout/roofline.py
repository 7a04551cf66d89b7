"""Step costs from layer sizes and a machine's figures, where nothing has been measured: a what-if, no claim.

A forward of `rows` tokens is its linear layers, its attention and a fixed part:

  linear     (memory^p + compute^p)^(1/p),  memory  = weights * bytes per weight / (bandwidth * share)
                                            compute = 2 * weights * rows / (FLOPs * share)
             p large: the larger of the two; small: both add up, because a kernel overlaps them badly.
             Where the share was measured at some numbers of rows, memory alone with that share, between them in log
             space; beyond the last one the formula, scaled to meet it there
  attention  max(KV bytes / (bandwidth * share), FLOPs / (FLOPs * share))
  fixed      seconds per layer (launches, norms, rotary embedding), and per verify (accepting, bookkeeping)

Every request has a context of its own, which is read once per forward. The drafter is 4-bit in all linear layers and in
the output matrix (4.125 bits per weight with a bf16 scale for 128 weights). Only bf16 targets, only dense models, one
device.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from sglang_er.models.sizes import public_size
from sglang_er.models.tiny import Shape
from sglang_er.policy.paper import Roofline

BF16_BYTES = 2.0
W4_BYTES = (4 + 16 / 128) / 8
# Layer sizes of Qwen2.5-14B, from its published configuration; the smaller ones are those of `sglang-er make-model`.
_14B = Shape(hidden=5120, layers=48, query_heads=40, kv_heads=8, head_dim=128, mlp=13824, vocab=152064)
MODELS: dict[str, tuple[str, Shape]] = {
    "0.5b": ("Qwen3-0.6B", public_size("qwen3", "0.5b").shape),
    "1.5b": ("Qwen3-1.7B", public_size("qwen3", "1.5b").shape),
    "7b": ("Qwen2.5-7B", public_size("qwen2", "7b").shape),
    "14b": ("Qwen2.5-14B", _14B),
}
_FORM = "hidden=H,layers=L,query_heads=Q,kv_heads=K,head_dim=D,mlp=M,vocab=V"


@dataclass(frozen=True)
class Linear:
    """How well linear layers of a precision use the machine: shares of its bandwidth and FLOPs, and the exponent."""

    bandwidth: float
    flops: float
    p: float
    measured: tuple[tuple[int, float], ...] = ()  # (rows, share of the bandwidth that the weights were read at), rising

    def seconds(self, memory: float, compute: float, rows: float) -> float:
        """`memory`, `compute`: seconds at the machine's full bandwidth and FLOPs; `compute` grows with the rows."""
        if not self.measured:
            return self._formula(memory, compute)
        last, share = self.measured[-1]
        if rows <= last:
            return memory / self._share(rows)
        return memory / share * self._formula(memory, compute) / self._formula(memory, compute * last / rows)

    def _formula(self, memory: float, compute: float) -> float:
        parts = memory / self.bandwidth, compute / self.flops
        return max(parts) if math.isinf(self.p) else sum(part**self.p for part in parts) ** (1 / self.p)

    def _share(self, rows: float) -> float:
        points = [math.log2(known) for known, _ in self.measured]
        return float(np.interp(math.log2(max(rows, 1)), points, [share for _, share in self.measured]))


@dataclass(frozen=True)
class Device:
    """Bytes/s, bf16 FLOPs/s (dense), shares, seconds."""

    name: str
    bandwidth: float
    flops: float
    target: Linear
    drafter: Linear
    attention: float  # share of the bandwidth for reading KV
    draft_attention: float  # the same in the draft pass, relative to bf16 KV: above 1 where it reads a smaller copy
    layer_seconds: float
    verify_seconds: float
    sources: str
    draft_layer_seconds: float | None = None  # of the draft pass; None: as any other


# Where the figures come from is in each preset's `sources`. Fixed seconds per layer on a GPU: 12 us of a
# FlashAttention-3 decode launch (vllm-project/flash-attention#63) and about six small kernels of 2 us (estimate).
# Accepting drafts: estimate.
_H100 = Device(
    name="h100",
    bandwidth=3.352e12,
    flops=990e12,
    target=Linear(bandwidth=0.69, flops=0.70, p=4),
    drafter=Linear(bandwidth=0.40, flops=0.39, p=2),
    attention=0.70,
    draft_attention=1.0,
    layer_seconds=24.6e-6,
    verify_seconds=0.4e-3,
    sources="peaks: NVIDIA's data sheet of the H100 SXM; linear layers: published timings of 8192 x 8192 on an H100 "
    "(mgoin/humming, benchmarks/results/h100: cuBLAS 58 us up to 128 rows, Marlin W4A16 27, 31, 37, 50, 90 us at 16, "
    "32, 64, 128, 256 rows); attention: vllm-project/flash-attention#63",
)
_H200 = replace(
    _H100,
    name="h200",
    bandwidth=4.8e12,
    target=Linear(bandwidth=0.75, flops=0.70, p=4),
    sources="peaks: NVIDIA's data sheet of the H200 SXM; bf16 bandwidth: SGLang's remark of 3.2 to 3.9 TB/s for cuBLAS "
    "at Qwen-like shapes; the rest as h100",
)
_A100 = replace(
    _H100,
    name="a100",
    bandwidth=2.039e12,
    flops=312e12,
    target=Linear(bandwidth=0.79, flops=0.75, p=4),
    drafter=Linear(bandwidth=0.59, flops=0.39, p=2),
    sources="peaks: NVIDIA's data sheet of the A100 80GB SXM; bf16 shares and the drafter's bandwidth: calibration "
    "published with EfficientRollout, arXiv 2606.18967 (1.617 TB/s, 233.5 TFLOPS, drafter 1.334 times slower); the "
    "rest as h100",
)
_CPU = Device(
    name="cpu",
    bandwidth=35.3e9,
    flops=240e9,
    target=Linear(bandwidth=0.64, flops=1.0, p=2),
    drafter=Linear(bandwidth=0.74, flops=3.7, p=2),
    attention=0.50,
    draft_attention=1.95,
    layer_seconds=0.0,
    verify_seconds=0.4e-3,
    sources="two cores of a Xeon (family 6, model 207, AVX-512) and this project's kernels: bench/cpu/kernels.json "
    "(bf16_linear and w4a8_linear at 1, 8, 32 rows; attention over 8192 tokens of bf16 and int4 KV); verify: "
    "scripts/bench_step.py",
)
PRESETS = {device.name: device for device in (_A100, _H100, _H200, _CPU)}


def parse_model(text: str) -> tuple[str, Shape]:
    """A name of `MODELS`, or layer sizes. Raises ValueError with one line."""
    if text in MODELS:
        return MODELS[text]
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in Shape.__dataclass_fields__ or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--model {text}: must be one of {', '.join(MODELS)}, or {_FORM}")
        sizes[name] = int(value)
    try:
        return "custom sizes", Shape(**sizes)
    except TypeError:
        raise ValueError(f"--model {text}: layer sizes are {_FORM}") from None


class RooflineCosts:
    """Costs by the formula above (`StepCosts`)."""

    gamma_max = 15
    batch_max = 1024

    def __init__(self, device: Device, model: str, shape: Shape) -> None:
        self.name = f"{device.name}, {model}"
        self.device, self.shape = device, shape
        self._weights = shape.parameters() - shape.vocab * shape.hidden  # the embedding is looked up, not read
        self._kv = 2 * shape.layers * shape.kv_heads * shape.head_dim  # elements per token
        self._qk = 4 * shape.layers * shape.query_heads * shape.head_dim  # FLOPs per token and token of context

    def plain(self, batch: int, context: float) -> float:
        return self._pass(self.device.target, BF16_BYTES, batch, context, 1, 1.0, self.device.layer_seconds)

    def draft(self, batch: int, context: float) -> float:
        device = self.device
        fixed = device.layer_seconds if device.draft_layer_seconds is None else device.draft_layer_seconds
        return self._pass(device.drafter, W4_BYTES, batch, context, 1, device.draft_attention, fixed)

    def verify(self, batch: int, context: float, gamma: int) -> float:
        device = self.device
        one = self._pass(device.target, BF16_BYTES, batch, context, gamma + 1, 1.0, device.layer_seconds)
        return one + device.verify_seconds

    def _pass(
        self,
        linear: Linear,
        bytes_per_weight: float,
        batch: int,
        context: float,
        tokens: int,
        kv_speed: float,
        fixed: float,
    ) -> float:
        device, rows = self.device, batch * tokens
        memory = self._weights * bytes_per_weight / device.bandwidth
        compute = 2 * self._weights * rows / device.flops
        read = batch * context * self._kv * BF16_BYTES / (device.bandwidth * device.attention * kv_speed)
        attend = rows * context * self._qk / (device.flops * device.target.flops)
        return linear.seconds(memory, compute, rows) + max(read, attend) + self.shape.layers * fixed

    def paper_constants(self) -> Roofline:
        """What the paper's rule would be told: its drafter keeps the output matrix in bf16, its c_* are not known."""
        shape, device = self.shape, self.device
        table = shape.vocab * shape.hidden
        return Roofline(
            target_bytes=BF16_BYTES * (self._weights + table),
            draft_bytes=0.25 * BF16_BYTES * (self._weights - table) + 2 * BF16_BYTES * table,
            dense_flops=2.0 * self._weights,
            attention_flops=self._qk,
            kv_bytes=BF16_BYTES * self._kv * device.target.bandwidth / device.attention,
            bandwidth=device.bandwidth * device.target.bandwidth,
            flops=device.flops * device.target.flops,
            draft_slowdown=device.target.bandwidth / device.drafter.bandwidth,
            plain_us=0.0,
            draft_us=0.0,
            verify_us=0.0,
        )


def make(preset: str, model: str) -> RooflineCosts:
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    return RooflineCosts(PRESETS[preset], *parse_model(model))


def published_constants(sweep: str) -> Roofline | None:
    """What the paper's authors fitted to a sweep of the package; None for any other."""
    source = resources.files(__package__) / "assets" / f"roofline_{sweep}.json"
    return Roofline.from_json(json.loads(source.read_text(encoding="utf-8"))) if source.is_file() else None
