"""The cases of every op: shapes of Qwen2.5's layers and of Qwen3-30B-A3B's experts, and odd ones.

A new op gets a maker in `kernel_makers.py` and a list here; who computes the cases comes from the registry
(`kernels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sglang_er.kernels import MarlinWeight
from sglang_er.kernels.kv_shadow import FORMATS

from . import captured_linears, sampling_makers
from . import kernel_makers as makers
from .kernel_makers import BF16, FP16, FP32, Draw, Prepared

NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
Prepare = Callable[[Draw], Prepared]


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    prepare: Prepare


def cases(op: str, small: bool) -> list[Case]:
    """Of one op; `small`: sizes for a CPU and for Triton's interpreter. Raises KeyError for an op without cases."""
    return _CASES[op](small)


def _listed(op: str, entries: Sequence[tuple[str, Prepare]]) -> list[Case]:
    return [Case(op, label, prepare) for label, prepare in entries]


def _w4_cases(op: str, small: bool) -> list[Case]:
    layers = [(48, 64, 32)] if small else [(4608, 3584, 128), (3584, 18944, 128), (37888, 3584, 128)]
    sizes = [(m, *layer) for layer in layers for m in ((1, 5) if small else (1, 2, 4, 7, 8, 16, 33, 64, 200))]
    sizes += (
        [(3, 77, 200, 32)]
        if small
        else [
            (3, 77, 200, 32),
            (17, 1000, 1096, 64),
            (5, 77, 203, 128),
            (1, 152064, 3584, 128),
        ]
    )
    made = [(m, n, k, group, BF16, None) for m, n, k, group in sizes]
    m, n, k, group = sizes[-1] if small else (9, 1536, 1536, 128)
    made += [(m, n, k, group, dtype, bias) for dtype in (BF16, FP16, FP32) for bias in {dtype: 0, FP32: 0}]
    own = [(_name(m, n, k, g, d, b), partial(makers.w4_linear, op, m, n, k, g, d, b)) for m, n, k, g, d, b in made]
    shapes = [(2, 48, 64, 32)] if small else [(m, 4608, 3584, 128) for m in (1, 8, 16, 33, 64, 128, 200)]
    shapes += [] if small else [(m, 1000, 1096, 128) for m in (3, 70)]
    own += [
        (f"captured {_name(*shape, d, None)}", partial(captured_linears.w4_linears, op, *shape, d))
        for shape in shapes
        for d in ((BF16,) if shape[1] == 4608 else (BF16, FP16))
    ]
    return _listed(op, own + (_marlin_linears(small) if op == "w4a16_linear" else []))


def _marlin_linears(small: bool) -> list[tuple[str, Prepare]]:
    """Both of its widths of tiles, every number of blocks of 16 rows, more rows than it takes at once, its groups."""
    layers = [(64, 128, 32)] if small else [(4608, 3584, 128), (3584, 18944, 128), (37888, 3584, 128), (960, 640, 64)]
    rows = (1, 5) if small else (1, 4, 8, 9, 16, 17, 33, 49, 64, 200, 256)
    made = [(m, *layer, BF16, None) for layer in layers for m in rows]
    made += [(9, 128, 256, 32, FP16, FP16), (3, 192, 384, 64, BF16, BF16)]
    made += [] if small else [(1, 152064, 3584, 128, BF16, None), (33, 1536, 1536, 128, FP16, None)]
    return [
        (
            f"marlin {_name(m, n, k, g, d, b)}",
            partial(makers.w4_linear, "w4a16_linear", m, n, k, g, d, b, layout=MarlinWeight),
        )
        for m, n, k, g, d, b in made
    ]


def _name(m: int, n: int, k: int, group: int, dtype: torch.dtype, bias: torch.dtype | None) -> str:
    return f"M={m} {n}x{k} g{group} {NAMES[dtype]}" + ("" if bias is None else f" bias {NAMES[bias]}")


def _experts_cases(small: bool) -> list[Case]:
    """Qwen3-30B-A3B's experts, and odd ones."""
    qwen = (2048, 768, 128)
    if small:
        made = [(3, (48, 40, 4), 2, 32, dtype) for dtype in (BF16, FP16, FP32)] + [(9, (32, 24, 3), 1, 64, BF16)]
    else:
        made = [(tokens, qwen, 8, 128, BF16) for tokens in (1, 2, 7, 16, 64, 128, 300)]
        made += [(33, (176, 72, 5), 2, group, dtype) for group in (32, 64, 96) for dtype in (BF16, FP16, FP32)]
        made += [(150, (1040, 200, 3), 1, 128, BF16), (64, (2048, 768, 16), 8, 128, FP16)]
        made += [(tokens, (3120, 1040, 2), 1, 128, dtype) for tokens in (1, 40) for dtype in (BF16, FP32)]
    named = [
        (f"T={t} {o}x{i} {n} experts, {k} each, g{g} {NAMES[d]}", partial(makers.w4a16_experts, t, (o, i, n), k, g, d))
        for t, (o, i, n), k, g, d in made
    ]
    return _listed("w4a16_experts", named)


def _quantize_cases(small: bool) -> list[Case]:
    sizes = (
        [(32, 64, 32), (5, 72, 32)] if small else [(4608, 3584, 128), (3584, 18944, 128), (1000, 1096, 64), (5, 72, 32)]
    )
    made = [(n, k, group, dtype) for n, k, group in sizes for dtype in ((BF16,) if n > 100 else (BF16, FP16, FP32))]
    named = [
        (f"{n}x{k} g{g} {NAMES[d]}" + (" clip search" if clip else ""), partial(makers.quantize_pack, n, k, g, d, clip))
        for n, k, g, d in made
        for clip in (False, True)
    ]
    marlin = [(64, 128, 32, BF16), (128, 384, 128, FP16)]
    marlin += [] if small else [(3584, 18944, 128, BF16), (960, 640, 64, BF16), (37888, 3584, 128, BF16)]
    named += [
        (f"marlin {n}x{k} g{g} {NAMES[d]}", partial(makers.quantize_pack, n, k, g, d, False, layout=MarlinWeight))
        for n, k, g, d in marlin
    ]
    return _listed("quantize_pack", named)


def _dequantize_cases(small: bool) -> list[Case]:
    sizes = [(32, 64, 32), (5, 72, 32)] if small else [(4608, 3584, 128), (1000, 1096, 64), (5, 72, 32)]
    return _listed("dequantize", [(f"{n}x{k} g{g}", partial(makers.dequantize, n, k, g)) for n, k, g in sizes])


def _bf16_cases(small: bool) -> list[Case]:
    sizes = [(1, 48, 64), (5, 77, 72)] if small else [(m, 4608, 3584) for m in (1, 2, 8, 33)] + [(5, 77, 200)]
    made = [(m, n, k, dtype, dtype if m > 1 else None) for m, n, k in sizes for dtype in (BF16, FP32)]
    named = [(f"M={m} {n}x{k} {NAMES[d]}", partial(makers.bf16_linear, m, n, k, d, b)) for m, n, k, d, b in made]
    return _listed("bf16_linear", named)


def _softmax_cases(small: bool) -> list[Case]:
    sizes = [(2, 97), (5, 256)] if small else [(1, 152064), (64, 152064), (129, 4097), (3, 17)]
    made = [(r, v, dtype) for r, v in sizes for dtype in (BF16, FP32)]
    return _listed(
        "softmax_rows", [(f"{r}x{v} {NAMES[d]}", partial(sampling_makers.softmax_rows, r, v, d)) for r, v, d in made]
    )


def _sample_cases(small: bool) -> list[Case]:
    sizes = (
        [(4, 0, 97), (5, 2, 64)]
        if small
        else [(1, 0, 152064), (64, 0, 152064), (129, 0, 4097), (16, 5, 152064), (33, 3, 4097)]
    )
    return _listed(
        "sample_rows", [(f"{r}x{v} chain {c}", partial(sampling_makers.sample_rows, r, c, v)) for r, c, v in sizes]
    )


def _draft_cases(small: bool) -> list[Case]:
    sizes = [(3, 97), (4, 1500)] if small else [(1, 152064), (64, 152064), (129, 4097), (3, 17)]
    made = [
        (r, v, filters, dtype)
        for r, v in sizes
        for filters, dtype in (
            ("", FP32),
            ("k", FP32),
            ("p", FP32),
            ("m", FP32),
            ("kpm", FP32),
            ("", BF16),
            ("kpm", BF16),
        )
    ]
    named = [
        (f"{r}x{v} filters {f or 'none'} {NAMES[d]}", partial(sampling_makers.draft_sample, r, v, f, d))
        for r, v, f, d in made
    ]
    return _listed("draft_sample", named)


def _seeded_cases(small: bool) -> list[Case]:
    sizes = [(3, 97), (2, 1500)] if small else [(1, 152064), (64, 152064), (129, 4097), (3, 17)]
    named = [
        (f"{r}x{v} {NAMES[d]}", partial(sampling_makers.choose_seeded, r, v, d)) for r, v in sizes for d in (BF16, FP32)
    ]
    return _listed("choose_seeded", named)


def _chain_cases(small: bool) -> list[Case]:
    sizes = [(4, 2, 97), (3, 5, 64)] if small else [(1, 3, 152064), (64, 3, 152064), (33, 7, 4097), (5, 1, 97)]
    named = [(f"{r}x{v} gamma {g}", partial(sampling_makers.verify_chain, r, g, v)) for r, g, v in sizes]
    return _listed("verify_chain", named)


def _attention_cases(small: bool) -> list[Case]:
    if small:
        shapes = [("mixed", [(19, 1), (33, 3), (1, 1)], (4, 2, 64), 1, -1), ("window", [(40, 2)], (4, 1, 32), 4, 9)]
        dtypes: tuple[torch.dtype, ...] = (FP32,)
    else:
        decode = [(1 + 613 * index, 1) for index in range(16)]
        shapes = [
            ("decode", decode, (28, 4, 128), 1, -1),
            ("verify", [(n + 6, 6) for n, _ in decode], (28, 4, 128), 16, -1),
            ("splits", [(1300, 1), (513, 1), (1, 1)], (8, 2, 128), 1, -1),
            ("prefill", [(300, 130), (77, 77), (5, 0)], (12, 2, 128), 1, -1),
            ("window", [(4000, 2), (90, 4)], (16, 8, 64), 1, 100),
            ("odd", [(257, 3), (64, 1)], (6, 3, 96), 1, -1),
        ]
        dtypes = (BF16, FP32)
    named = [
        (
            f"{label} {NAMES[d]}" + (f" shadow {format}" if format else ""),
            partial(makers.paged_attention, r, h, d, page, w, format),
        )
        for label, r, h, page, w in shapes
        for d in dtypes
        for format in (None, *FORMATS)
    ]
    return _listed("paged_attention", named)


def _store_cases(small: bool) -> list[Case]:
    sizes = [(5, 2, 64)] if small else [(4096, 4, 128), (1, 8, 128), (333, 3, 96), (64, 2, 64)]
    made = [(t, h, d, format, dtype) for t, h, d in sizes for format in FORMATS for dtype in (BF16, FP32)]
    named = [(f"{t}x{h}x{d} {f} {NAMES[y]}", partial(makers.kv_shadow_store, t, h, d, f, y)) for t, h, d, f, y in made]
    return _listed("kv_shadow_store", named)


_CASES: dict[str, Callable[[bool], list[Case]]] = {
    "bf16_linear": _bf16_cases,
    "choose_seeded": _seeded_cases,
    "dequantize": _dequantize_cases,
    "draft_sample": _draft_cases,
    "kv_shadow_store": _store_cases,
    "paged_attention": _attention_cases,
    "quantize_pack": _quantize_cases,
    "sample_rows": _sample_cases,
    "softmax_rows": _softmax_cases,
    "verify_chain": _chain_cases,
    "w4a16_experts": _experts_cases,
    "w4a16_linear": partial(_w4_cases, "w4a16_linear"),
    "w4a8_linear": partial(_w4_cases, "w4a8_linear"),
}
