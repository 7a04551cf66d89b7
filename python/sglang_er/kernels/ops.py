"""The ops as the rest of the house calls them: arguments are checked here, then the registry picks who computes."""

from __future__ import annotations

import torch

from sglang_er.kernels.base import (
    HALF_DTYPES,
    WEIGHT_DTYPES,
    PackedWeight,
    check_device,
    check_dtype,
    check_matrix,
    check_vector,
)
from sglang_er.kernels.cpu import bf16_linear as cpu_bf16_linear
from sglang_er.kernels.cpu import dequantize as cpu_dequantize
from sglang_er.kernels.cpu import quantize_pack as cpu_quantize_pack
from sglang_er.kernels.cpu import w4a8_linear as cpu_w4a8_linear
from sglang_er.kernels.cpu import w4a16_linear as cpu_w4a16_linear
from sglang_er.kernels.cuda import quantize_pack as cuda_quantize_pack
from sglang_er.kernels.cuda import w4a8_linear as cuda_w4a8_linear
from sglang_er.kernels.cuda import w4a16_linear as cuda_w4a16_linear
from sglang_er.kernels.formats import layout_for
from sglang_er.kernels.marlin import quantize_pack as marlin_quantize_pack
from sglang_er.kernels.marlin import w4a16_linear as marlin_w4a16_linear
from sglang_er.kernels.marlin_weight import QuantizedWeight
from sglang_er.kernels.reference import bf16_linear as reference_bf16_linear
from sglang_er.kernels.reference import dequantize as reference_dequantize
from sglang_er.kernels.reference import quantize_pack as reference_quantize_pack
from sglang_er.kernels.reference import w4a8_linear as reference_w4a8_linear
from sglang_er.kernels.reference import w4a16_linear as reference_w4a16_linear
from sglang_er.kernels.registry import (
    REFERENCE,
    Implementation,
    register,
    register_cuda,
    register_marlin,
    register_triton,
    run,
)

_ACTIVATION_DTYPES = WEIGHT_DTYPES
_REFERENCE_DTYPES = WEIGHT_DTYPES | {torch.float64}


def _own_second(first: object, weight: object, *rest: object) -> bool:
    """Our own layout, as the second argument."""
    return isinstance(weight, PackedWeight)


def _own_first(weight: object, *rest: object) -> bool:
    return isinstance(weight, PackedWeight)


def _own_out(weight: object, clip_search: bool, out: object) -> bool:
    return isinstance(out, PackedWeight)


def _int8_in_triton(x: torch.Tensor, weight: object, bias: torch.Tensor | None, out: torch.Tensor) -> bool:
    return isinstance(weight, PackedWeight) and weight.group_size in (64, 128)


register("quantize_pack", Implementation(REFERENCE, None, WEIGHT_DTYPES, reference_quantize_pack.quantize_pack))
register("quantize_pack", Implementation("cpu", "cpu", WEIGHT_DTYPES, cpu_quantize_pack.quantize_pack, _own_out))
register("w4a16_linear", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_w4a16_linear.w4a16_linear))
register("w4a16_linear", Implementation("cpu", "cpu", _ACTIVATION_DTYPES, cpu_w4a16_linear.w4a16_linear, _own_second))
register("bf16_linear", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_bf16_linear.bf16_linear))
register("bf16_linear", Implementation("cpu", "cpu", _ACTIVATION_DTYPES, cpu_bf16_linear.bf16_linear))
register(
    "w4a8_linear", Implementation(REFERENCE, None, _REFERENCE_DTYPES, reference_w4a8_linear.w4a8_linear, _own_second)
)
register("w4a8_linear", Implementation("cpu", "cpu", _ACTIVATION_DTYPES, cpu_w4a8_linear.w4a8_linear, _own_second))
register("dequantize", Implementation(REFERENCE, None, WEIGHT_DTYPES, reference_dequantize.dequantize))
register("dequantize", Implementation("cpu", "cpu", WEIGHT_DTYPES, cpu_dequantize.dequantize, _own_first))
register_cuda("quantize_pack", WEIGHT_DTYPES, cuda_quantize_pack.quantize_pack, cuda_quantize_pack.serves)
register_cuda("w4a16_linear", HALF_DTYPES, cuda_w4a16_linear.w4a16_linear, cuda_w4a16_linear.serves)
register_cuda("w4a8_linear", HALF_DTYPES, cuda_w4a8_linear.w4a8_linear, cuda_w4a8_linear.serves)
register_triton("quantize_pack", WEIGHT_DTYPES, _own_out)
register_triton("w4a16_linear", WEIGHT_DTYPES, _own_second)
register_triton("w4a8_linear", WEIGHT_DTYPES, _int8_in_triton)
register_triton("dequantize", WEIGHT_DTYPES, _own_first)
# On any device, so that the layout can be tried where the kernel cannot.
register_marlin("quantize_pack", None, WEIGHT_DTYPES, marlin_quantize_pack.quantize_pack, marlin_quantize_pack.serves)
register_marlin("w4a16_linear", "cuda", HALF_DTYPES, marlin_w4a16_linear.w4a16_linear, marlin_w4a16_linear.serves)


def quantize_pack(
    weight: torch.Tensor,
    group_size: int = 128,
    *,
    clip_search: bool = False,
    out: QuantizedWeight | None = None,
    implementation: str | None = None,
) -> QuantizedWeight:
    """Quantizes ``weight[N, K]`` (bf16, fp16, fp32) to int4 in groups of ``group_size`` along K, into our own layout
    or, where ``marlin`` is asked before others and takes the shape, into Marlin's.

    For every row and group, with ``lo`` and ``hi`` the group's minimum and maximum::

        scale = max(bf16(hi / 15 - lo / 15), 2**-126)       zero = bf16(lo)
        q     = clamp(round((w - zero) * (1 / scale)), 0, 15)        W = q * scale + zero

    With ``clip_search``, q may stand for a smaller range, weights outside of which are cut to its ends: of the eight
    ranges that lack (bottom, top) 64ths of the whole one::

        (0, 0)  (0, 2)  (1, 1)  (2, 0)  (0, 3)  (3, 0)  (2, 3)  (3, 2)

        scale' = max(bf16(scale * (64 - bottom - top) / 64), 2**-126)       zero' = bf16(lo + scale * 15 * bottom / 64)

    the one with the least sum of squared errors, of equals the first. Errors are integers, 1024 to a ``scale``, as
    csrc/include/sglang_er/clip_search.h defines them: every implementation takes the same range. Mean squared error of
    weights: .85 of that without; time: docs/kernels.md.

    For a ``MarlinWeight``, whose zero points are integers, with ``lo`` at most and ``hi`` at least 0 and ``tiny`` the
    least normal number of the scale's dtype ``half``::

        scale = max(half(hi / 15 - lo / 15), tiny)          z = clamp(round(-lo * (1 / scale)), 0, 15)
        q     = clamp(round(w * (1 / scale)) + z, 0, 15)    W = half((q - z) * scale)

    and no ``clip_search`` (ValueError).

    Rows may lie any distance apart. Weights must be finite (others give some finite level, never a crash).
    ``out`` receives the result in its own buffers, whose addresses do not change; it must have been made for the
    same shape and ``group_size``. Otherwise buffers are allocated.
    """
    rows, cols = weight.shape if weight.ndim == 2 else (None, None)
    check_matrix("weight", weight, rows, cols)
    check_dtype("weight", weight, WEIGHT_DTYPES)
    if weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, nothing to quantize")
    if out is None:
        layout = layout_for(weight, group_size, implementation)
        out = layout.empty(weight.shape[0], weight.shape[1], group_size, weight.dtype, weight.device)
    elif out.shape != tuple(weight.shape) or out.group_size != group_size:
        raise ValueError(
            f"out was made for {list(out.shape)} in groups of {out.group_size}, "
            f"weight is {list(weight.shape)} in groups of {group_size}"
        )
    if clip_search and not isinstance(out, PackedWeight):
        raise ValueError(f"clip_search is for our own layout, not for a {type(out).__name__}: leave it out, or marlin")
    check_device("out", out.packed, weight.device)
    run("quantize_pack", weight.device.type, weight.dtype, implementation, weight, clip_search, out)
    return out


def w4a16_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """``out[M, N] = x[M, K] @ W[N, K].T + bias[N]``, W int4, x not quantized, accumulated in fp32.

    ``x`` is bf16, fp16 or fp32 (the reference takes fp64 too); ``out`` has its dtype; ``bias`` has its dtype or is
    fp32. Rows of ``x`` and ``out`` may lie any distance apart. A row's result does not depend on the other rows
    nor on the number of threads. A row with a NaN or an infinity gives values that are not finite.
    """
    rows, cols = weight.out_features, weight.in_features
    check_matrix("x", x, None, cols)
    check_device("x", x, weight.packed.device)
    if bias is not None:
        check_vector("bias", bias, rows)
        check_dtype("bias", bias, frozenset({x.dtype, torch.float32}))
        check_device("bias", bias, x.device)
    if out is None:
        out = x.new_empty((x.shape[0], rows))
    else:
        check_matrix("out", out, x.shape[0], rows)
        check_dtype("out", out, frozenset({x.dtype}))
        check_device("out", out, x.device)
    if x.shape[0] > 0:
        run("w4a16_linear", x.device.type, x.dtype, implementation, x, weight, bias, out)
    return out


def bf16_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """``out[M, N] = x[M, K] @ weight[N, K].T + bias[N]``, accumulated in fp32, from the weight as it is stored.

    Each of ``x``, ``weight``, ``bias`` and ``out`` may be bf16, fp16 or fp32 on its own (the reference takes fp64
    too); ``out`` gets the dtype of ``x`` unless ``out_dtype`` says another. Rows may lie any distance apart. A row's
    result does not depend on the other rows nor on the number of threads.
    """
    check_matrix("weight", weight, None, None)
    check_matrix("x", x, None, weight.shape[1])
    check_device("x", x, weight.device)
    rows = weight.shape[0]
    allowed = _REFERENCE_DTYPES if x.dtype == torch.float64 else _ACTIVATION_DTYPES
    check_dtype("weight", weight, allowed)
    if bias is not None:
        check_vector("bias", bias, rows)
        check_dtype("bias", bias, allowed)
        check_device("bias", bias, x.device)
    if out is None:
        out = x.new_empty((x.shape[0], rows), dtype=out_dtype)
    else:
        check_matrix("out", out, x.shape[0], rows)
        check_device("out", out, x.device)
    check_dtype("out", out, allowed if out_dtype is None else frozenset({out_dtype}) & allowed)
    if out.numel() > 0:
        run("bf16_linear", x.device.type, x.dtype, implementation, x, weight, bias, out)
    return out


def w4a8_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """``out[M, N] = x^[M, K] @ W[N, K].T + bias[N]``, W int4, x^ = x rounded to int8, accumulated in fp32.

    For every row of x and group of K, with ``top = max(max |x|, 2**-110)``, in fp32::

        scale = top / 127       level = round(x * (127 / top))       x^ = level * scale

    An activation moves by at most ``scale / 2``: for normally distributed x the result is off by .55 to .66 % of its
    norm (more, the heavier the tails of x; ``w4a16_linear`` does not round x). In return the products are exact
    integers, four times as many an instruction.

    ``x`` is bf16, fp16 or fp32 (the reference takes fp64 too, and rounds it to fp32 first); ``out`` has the dtype
    ``out_dtype``, by default that of ``x``; ``bias`` has the dtype of ``x`` or any of those three. Rows of ``x`` and
    ``out`` may lie any distance apart. A row's result does not depend on the other rows nor on the number of
    threads. A row with a NaN or an infinity gives NaN throughout.
    """
    rows, cols = weight.out_features, weight.in_features
    check_matrix("x", x, None, cols)
    check_device("x", x, weight.packed.device)
    if bias is not None:
        check_vector("bias", bias, rows)
        check_dtype("bias", bias, _ACTIVATION_DTYPES | {x.dtype})
        check_device("bias", bias, x.device)
    if out is None:
        out = x.new_empty((x.shape[0], rows), dtype=out_dtype)
    else:
        check_matrix("out", out, x.shape[0], rows)
        check_dtype("out", out, frozenset({out_dtype}) if out_dtype else _ACTIVATION_DTYPES | {x.dtype})
        check_device("out", out, x.device)
    check_dtype("out", out, _ACTIVATION_DTYPES | {x.dtype})
    if x.shape[0] > 0:
        run("w4a8_linear", x.device.type, x.dtype, implementation, x, weight, bias, out)
    return out


def dequantize(weight: QuantizedWeight, *, implementation: str | None = None) -> torch.Tensor:
    """``W[N, K]`` in fp32: the weight that ``weight`` stands for, ``q * scale + zero`` in our own layout."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    run("dequantize", weight.device.type, weight.dtype, implementation, weight, out)
    return out
