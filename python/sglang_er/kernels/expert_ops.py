"""The experts of a mixture in one op, as the rest of the house calls it (see ``ops.py``)."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import ROW_BLOCK, WEIGHT_DTYPES, PackedWeight, check_device, check_dtype, check_matrix
from sglang_er.kernels.cpu import w4a16_experts as cpu_w4a16_experts
from sglang_er.kernels.marlin_weight import QuantizedWeight
from sglang_er.kernels.reference import w4a16_experts as reference_w4a16_experts
from sglang_er.kernels.registry import REFERENCE, Implementation, register, register_triton, run

_REFERENCE_DTYPES = WEIGHT_DTYPES | {torch.float64}
_INDICES = frozenset({torch.int32, torch.int64})

register("w4a16_experts", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_w4a16_experts.w4a16_experts))
register("w4a16_experts", Implementation("cpu", "cpu", WEIGHT_DTYPES, cpu_w4a16_experts.w4a16_experts))
register_triton("w4a16_experts", WEIGHT_DTYPES)


def w4a16_experts(
    x: torch.Tensor,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    experts: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """A mixture of gated experts, W int4, x not quantized, accumulated in fp32. For a token ``t``::

        gate, up = (x[t] @ gate_up[e].T).chunk(2)          e = experts[t, c]
        out[t]   = sum over c of weights[t, c] * (silu(gate) * up) @ down[e].T

    ``x[T, K]`` is bf16, fp16 or fp32 (the reference takes fp64 too); ``out`` has its shape and dtype; what lies between
    the two products may be rounded to its dtype. ``gate_up`` is ``[count * 2 * I, K]`` and ``down`` ``[count * K, I]``,
    expert after expert, in our own layout (else TypeError), K and 2 * I multiples of 16. ``experts`` (int32 or int64)
    and ``weights`` (of x's dtype or fp32) are ``[T, k]``; experts below 0 are another rank's and add nothing. Numbers
    from ``count`` on are not looked for: that would wait for the device. Rows of all may lie any distance apart.

    A row's result does not depend on the other rows. Nothing is read on the host, but for CPUs.
    """
    if not (isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)):
        raise TypeError("w4a16_experts takes weights in our own layout: give quantize_pack PackedWeight.empty as out")
    check_matrix("x", x, None, gate_up.in_features)
    tokens, outputs = x.shape
    inner, count = down.in_features, down.out_features // outputs
    if count == 0 or down.out_features % outputs or gate_up.out_features != count * 2 * inner:
        raise ValueError(
            f"gate_up {list(gate_up.shape)} and down {list(down.shape)} are not [count * 2 * I, K] and [count * K, I] "
            f"of one count with K = {outputs}"
        )
    if outputs % ROW_BLOCK or 2 * inner % ROW_BLOCK:
        raise ValueError(f"experts of {2 * inner} and {outputs} rows are not whole blocks of {ROW_BLOCK}")
    check_matrix("experts", experts, tokens, None)
    check_dtype("experts", experts, _INDICES)
    check_matrix("weights", weights, tokens, experts.shape[1])
    check_dtype("weights", weights, frozenset({x.dtype, torch.float32}))
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        check_matrix("out", out, tokens, outputs)
        check_dtype("out", out, frozenset({x.dtype}))
    named = {"gate_up": gate_up.packed, "down": down.packed, "experts": experts, "weights": weights, "out": out}
    for name, tensor in named.items():
        check_device(name, tensor, x.device)
    if experts.shape[1] == 0:
        out.zero_()
    elif tokens > 0:
        arguments = (x, gate_up, down, experts, weights, out)
        run("w4a16_experts", x.device.type, x.dtype, implementation, *arguments)
    return out
