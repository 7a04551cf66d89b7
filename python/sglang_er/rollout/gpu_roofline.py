"""`--gpu`: the formula of `roofline.py` for a GPU, its constants measured where scripts/gpu_check.sh has measured them.

Levels: `physical`, the machine's peaks and no fixed cost, a bound; `today`, what published kernels reach; `target`,
what this project's kernels are written for. The constants of the last two are estimates, and are replaced one by one by
what was recorded on such a device (`gpu_constants.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sglang_er.rollout import gpu_constants, gpu_records
from sglang_er.rollout.costs import Constant
from sglang_er.rollout.gpu_records import RecordsError
from sglang_er.rollout.roofline import PRESETS, Device, Linear, RooflineCosts, parse_model

GPUS = tuple(name for name in PRESETS if name != "cpu")
LEVELS = ("physical", "today", "target")
DEFAULT_LEVEL = "today"
# Bytes of bf16 KV over those of its int4 shadow, per token and head at head_dim 128 (docs/gpu.md).
SHADOW = 512 / 132
# Of `target`, estimates: 4-bit linear layers at .65 of the bandwidth, the shadow read at .55 where the pool is at .70,
# an attention launch of 6 us and two other kernels of 4 us a layer, accepting in .2 ms.
_TARGET_DRAFTER = Linear(bandwidth=0.65, flops=0.55, p=2)
_TARGET_DRAFT_ATTENTION = 0.55 * SHADOW / 0.70
_TARGET_LAYER, _TARGET_VERIFY = 14.3e-6, 0.2e-3
_PHYSICAL = "data sheet, nothing lost"


def make(gpu: str, model: str, level: str, records: Path | None) -> tuple[RooflineCosts, list[Constant]]:
    """`records`: a file of scripts/gpu_check.sh; None: what bench/gpu of the source tree has for this GPU. Raises
    ValueError, or OSError, in one line."""
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: must be one of {', '.join(GPUS)}")
    if level not in LEVELS:
        raise ValueError(f"--gpu-level {level}: must be one of {', '.join(LEVELS)}")
    if level == "physical" and records is not None:
        raise ValueError("--gpu-records: the physical level is the data sheet's, no record changes it")
    device = of_level(PRESETS[gpu], level)
    if level == "physical":
        constants = [Constant(name, value, _PHYSICAL) for name, value in gpu_constants.shown(device)]
    else:
        used = _of_gpu(gpu, records)
        try:
            device, constants = gpu_constants.measured(device, used, level)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            where = "bench/gpu" if records is None else f"--gpu-records {records}"
            raise RecordsError(f"{where}: damaged ({type(error).__name__}: {error})") from None
    return RooflineCosts(replace(device, name=f"{gpu} ({level})"), *parse_model(model)), constants


def of_level(device: Device, level: str) -> Device:
    if level == "today":
        return device
    if level == "target":
        return replace(
            device,
            drafter=_TARGET_DRAFTER,
            draft_attention=_TARGET_DRAFT_ATTENTION,
            draft_layer_seconds=_TARGET_LAYER,
            verify_seconds=_TARGET_VERIFY,
        )
    whole = Linear(bandwidth=1.0, flops=1.0, p=math.inf)
    return replace(
        device,
        target=whole,
        drafter=whole,
        attention=1.0,
        draft_attention=SHADOW,
        layer_seconds=0.0,
        verify_seconds=0.0,
    )


def _of_gpu(gpu: str, file: Path | None) -> Sequence[gpu_records.Record]:
    """All of one device, the newest last; empty where bench/gpu has none."""
    paths = gpu_records.committed() if file is None else [file]
    every = gpu_records.read(paths)
    mine = [record for record in every if gpu.upper() in record["device"].upper()]
    if file is not None and not mine:
        devices = ", ".join(sorted({record["device"] for record in every})) or "no device"
        raise RecordsError(f"--gpu-records {file}: records of {devices}, none of a {gpu.upper()}")
    if not mine:
        return []
    # Cards of one name differ in memory and clocks: those of the newest record.
    return [record for record in mine if record["device"] == mine[-1]["device"]]
