# Attention of single query tokens over the paged pool, by split contexts: decode; verify and prefill token by token.
#
# One program serves one query token and one KV head with all its query heads (padded to 16 rows of a tensor core's
# tile), so that a key is read once for its group. Contexts are cut at multiples of SPLIT positions; split s belongs to
# lane s % LANES, a lane's splits are one running softmax, and paged_attention_merge.py merges the lanes in order. Cuts
# are fixed positions and every token has its own programs, so its bits do not depend on the batch, on the number of
# query tokens, nor on how lanes are spread over programs. No length is known on the host: programs without keys exit.
#
# Old blocks of keys come from the shadow, with the lanes that it lacks from the pool in a branch of their own; the
# newest ones from the pool alone. Scales stay out of the dot products: a score is scale * (q . levels), a weighted
# value (p * scale) * levels. int4 levels enter them with an offset (int4_operands), which the sums of q and of p
# take back. Even and odd dimensions of a key, and the halves of 32 dimensions of a value, are products of their own,
# so nibbles are never interleaved.
#
# Bound by memory traffic at large batch * context: 136 bytes a key and KV head at int4 and head_dim 128, 264 at int8
# and fp8, 512 at bf16.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_er.kernels.kv_shadow import KvShadow
from sglang_er.kernels.triton.fp8 import FP8_CONVERTED, converts_fp8
from sglang_er.kernels.triton.paged_attention_kernel import attend_kernel
from sglang_er.kernels.triton.paged_attention_merge import merge_kernel, merge_lanes
from sglang_er.kernels.triton.rotation import rotation_norm, rotation_steps
from sglang_er.kernels.triton.rounding import emulated

# Both are part of the result's bits, never chosen by batch. A split is long enough that its partial sums (512 bytes a
# query head) are small beside its keys; 32 lanes fill a GPU with one request, and bound the scratch.
SPLIT = 512
LANES = 32
# Programs that fill a GPU several times over, so that contexts of unequal length balance; more lanes than that for one
# token run one after another. At least 8 of its lanes run at a time, because one long context may be the last to end.
_PROGRAMS = 1024
_MIN_PROGRAMS_A_TOKEN = 8
# Bytes of partial sums of one launch; prefill is cut into launches of fewer tokens.
_SCRATCH = 128 << 20

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    query_begin: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int,
    shadow: KvShadow | None,
    valid: torch.Tensor | None,
    exact_newest: int,
    out: torch.Tensor,
) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads, value_dim = values.shape[1], values.shape[2]
    if tokens == 0 or heads == 0:
        return
    lanes = min(LANES, max(1, triton.cdiv(req_to_token.shape[1], SPLIT)))
    chunk = min(tokens, max(1, _SCRATCH // (heads * lanes * (value_dim + 2) * 4)))
    sums = torch.empty((chunk, heads, lanes, value_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((2, chunk, heads, lanes), dtype=torch.float32, device=q.device)
    parts: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if shadow is not None:
        parts = (shadow.keys, shadow.values, shadow.key_scales, shadow.value_scales)
    constants, options = _constants(q.dtype, keys.dtype, head_dim, value_dim, _format_for(shadow, q.device))
    requests = rows.shape[0]
    for token in range(0, tokens, chunk):
        count = min(chunk, tokens - token)
        programs = max(_MIN_PROGRAMS_A_TOKEN, triton.cdiv(_PROGRAMS, count * kv_heads))
        attend_kernel[(count, kv_heads, min(lanes, programs))](
            q,
            keys,
            values,
            req_to_token,
            rows,
            query_begin,
            context_lens,
            *parts,
            valid if shadow is not None else None,
            sums,
            stats[0],
            stats[1],
            requests,
            token,
            exact_newest,
            window,
            scale * 1.4426950408889634,  # log2(e): powers of two are what the GPU has
            q.stride(0),
            keys.stride(0),
            values.stride(0),
            req_to_token.stride(0),
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
            SPLIT=SPLIT,
            LANES=lanes,
            **constants,
            **options,
        )
        merge_lanes(sums, stats, query_begin, context_lens, requests, token, count, window, SPLIT, out)


def _format_for(shadow: KvShadow | None, device: torch.device) -> str:
    """As the kernel's constexpr has it."""
    if shadow is None:
        return "none"
    return FP8_CONVERTED if shadow.format == "fp8" and converts_fp8(device) else shadow.format


def _constants(
    q_dtype: torch.dtype, pool_dtype: torch.dtype, head_dim: int, value_dim: int, format: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants that depend on types and sizes, and launch options."""
    same = q_dtype == pool_dtype
    half = q_dtype != torch.float32
    wide = max(head_dim, value_dim) > 128 or not (same and half)
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "FORMAT": format,
        # Keys a step: part of the bits, so the same with and without a shadow. Fewer where a key takes more registers.
        "KEYS": 32 if wide else 64,
        "KEY_COLS": max(32, triton.next_power_of_2(head_dim)),
        "VALUE_COLS": max(32, triton.next_power_of_2(value_dim)),
        # Of the products with the pool: its own type if q has it too, so that nothing is rounded but p.
        "POOL_TYPE": _TYPES[q_dtype] if same else tl.float32,
        "KEY_TYPE": _TYPES[q_dtype],
        # p * scale has the range of bf16: fp16 would lose small scales.
        "VALUE_TYPE": tl.bfloat16 if half else tl.float32,
        "STEPS": rotation_steps(head_dim),
        "NORM": rotation_norm(head_dim),
        "EMULATED": emulated(),
    }
    # Keys and values in flight while others are multiplied: 64 KiB of a bf16 pool at head_dim 128.
    return constants, {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


_INTEGERS = ("requests", "first_token", "exact_newest", "window", "q_stride", "key_stride", "value_stride")
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _attend_spec(heads: int, kv_heads: int, dim: int, format: str, dtype: torch.dtype) -> Any:
    name = f"*{_TYPE_NAMES[dtype]}"
    types = {"q": name, "keys": name, "values": name, "table": "*i32", "scale": "fp32"}
    types |= {"rows": "*i64", "query_begin": "*i64", "context_lens": "*i64"}
    types |= dict.fromkeys(("sums", "maxima", "totals"), "*fp32") | dict.fromkeys((*_INTEGERS, "table_stride"), "i32")
    constants, _ = _constants(dtype, dtype, dim, dim, format)
    constants |= {"KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "ROWS": 16, "SPLIT": SPLIT, "LANES": LANES}
    constants["EMULATED"] = False
    shadow = ("key_levels", "value_levels", "key_scales", "value_scales", "valid")
    if format != "none":
        levels = "*i8" if format == "int8" else "*u8"
        types |= dict(zip(shadow, (levels, levels, "*bf16", "*bf16", "*u8"), strict=True))
    else:
        constants |= dict.fromkeys(shadow)
    return attend_kernel, {arg: types.get(arg, "constexpr") for arg in attend_kernel.arg_names}, constants


def _merge_spec(heads: int, dim: int, out: torch.dtype) -> Any:
    types = dict.fromkeys(("sums", "maxima", "totals"), "*fp32") | dict.fromkeys(
        ("query_begin", "context_lens"), "*i64"
    )
    types |= dict.fromkeys(("requests", "first_token", "window", "out_stride"), "i32")
    types["out"] = f"*{_TYPE_NAMES[out]}"
    constants = {"HEADS": heads, "VALUE_DIM": dim, "SPLIT": SPLIT, "LANES": LANES, "LANE_ROWS": LANES, "COLS": dim}
    constants["EMULATED"] = False
    return merge_kernel, {arg: types.get(arg, "constexpr") for arg in merge_kernel.arg_names}, constants


SPECS = [
    *(
        _attend_spec(heads, 4, 128, format, torch.bfloat16)
        for heads in (28, 16, 32)
        for format in ("int4", "int8", "fp8", FP8_CONVERTED, "none")
    ),
    _attend_spec(14, 2, 64, "int4", torch.bfloat16),
    *(_attend_spec(14, 2, 96, format, torch.float16) for format in ("int4", "fp8", FP8_CONVERTED)),
    *(_attend_spec(8, 4, 256, format, torch.bfloat16) for format in ("int4", "fp8", FP8_CONVERTED)),
    *(_attend_spec(14, 2, 64, format, torch.float32) for format in ("int4", "fp8", FP8_CONVERTED)),
    _merge_spec(28, 128, torch.bfloat16),
    _merge_spec(28, 128, torch.float32),
]
