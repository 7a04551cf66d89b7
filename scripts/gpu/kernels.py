"""Section `kernels`: every implementation of every op that serves the device, on fresh random inputs, against the
reference. A cell is one op and one implementation.
"""

from __future__ import annotations

import secrets
import traceback
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from sglang_er.kernels import registry

from .kernel_cases import Case, cases
from .kernel_makers import Draw
from .sections import Cell, Context, Options, Section, Skip, shortened

# Triton's interpreter cuts what a GPU rounds to bf16: twice the error.
INTERPRETER_SLACK = 2.0


def cells(options: Options) -> Sequence[Cell]:
    return [
        Cell(f"{op} {name}", partial(check, op, name)) for op in registry.ops() for name in names(op, options.device)
    ]


def names(op: str, device: str) -> list[str]:
    """Implementations of `op` for `device`, but for the reference; under Triton's interpreter its kernels take CPUs."""
    found = registry.implementations(op)
    return [entry.name for entry in found if entry.name != registry.REFERENCE and entry.device in (None, device)]


def check(op: str, name: str, context: Context) -> dict[str, Any]:
    """All cases of one implementation."""
    return judge(cases(op, context.options.dry_run), name, context.options.device)


def judge(chosen: Sequence[Case], name: str, device: str) -> dict[str, Any]:
    """These cases of one implementation. A seed is enough to draw the inputs of a case again. Raises Skip where it
    serves none of them."""
    seed = secrets.randbits(31)
    found = {case.label: _result(case, name, seed, device) for case in chosen}
    judged = {label: result for label, result in found.items() if "not_served" not in result}
    if not judged:
        raise Skip(f"{name} serves none of the {len(found)} cases")
    wrong = [label for label, result in judged.items() if not result.get("ok")]
    errors = [result["error"] for result in judged.values() if isinstance(result["error"], float)]
    shown = f"{len(judged)} of {len(found)} cases, largest error {max(errors, default=0.0):.1e}"
    if wrong:
        shown += f"; wrong: {', '.join(wrong[:4])}" + (" ..." if len(wrong) > 4 else "")
    return {"passed": not wrong, "shown": shown, "seed": seed, "cases": found}


def _result(case: Case, name: str, seed: int, device: str) -> dict[str, Any]:
    """`error`: a number or what was raised; `not_served`: the implementation does not take these arguments."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.op} {case.label}".encode()) ^ seed)
    try:
        prepared = case.prepare(Draw(device, generator))
        prepared.call(name)
        if device == "cuda":
            torch.cuda.synchronize()
        error = prepared.error()
    except TypeError as refused:
        if "serve" in str(refused):
            return {"not_served": str(refused)}
        return {"error": shortened(traceback.format_exc()), "ok": False}
    except Exception:
        return {"error": shortened(traceback.format_exc()), "ok": False}
    tolerance = prepared.tolerance * (INTERPRETER_SLACK if name == "triton" and device == "cpu" else 1.0)
    return {"error": error, "tolerance": tolerance, "ok": error <= tolerance}


SECTION = Section("kernels", cells, isolated=True)
