"""Whether a draft's product rounds its activations: `w4a8_linear` in the place of `w4a16_linear`.

Both read the same packed weight. On a CPU products of int8 are the faster ones at any number of rows. A GPU waits for
the weight while there are few rows, and either op does; with more rows it waits for instructions, of which int8 has
half as many, and for products, of which it has half as many, too. A draft may be drawn from any distribution: nothing
depends on the choice but speed, and how many drafts are accepted.
"""

from __future__ import annotations

import torch

from sglang_er.kernels import registry
from sglang_er.kernels.base import PackedWeight

FEWEST_ROWS = 17
"""On a GPU whose times are in no table. While 17 KB of weight come to a multiprocessor of an H200, 940 cycles, it has
to issue, by the machine code, 1270 cycles of instructions for 17 to 32 rows, and in int8 600; up to 16 rows 880 and 460
(docs/gpu.md#kernels)."""


def int8_pays(x: torch.Tensor, weight: PackedWeight) -> bool:
    """For the rows of x and this weight."""
    if x.device.type == "cpu":
        return True
    times = [registry.least_time(op, x.device.type, x.dtype, x, weight) for op in ("w4a8_linear", "w4a16_linear")]
    if times[0] is not None and times[1] is not None:
        return times[0] < times[1]
    if x.shape[0] < FEWEST_ROWS:
        return False
    entry = registry.serving("w4a8_linear", x.device.type, x.dtype, x, weight, None, x)
    return entry is not None and entry.name != registry.REFERENCE
