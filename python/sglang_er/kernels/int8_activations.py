"""Whether a draft's product rounds its activations: `w4a8_linear` in the place of `w4a16_linear`.

Both read the same packed weight. On a CPU products of int8 are the faster ones at any number of rows. A GPU waits for
the weight while there are few rows, and either op does; from some number of rows on it waits for products, of which
int8 has half as many. A draft may be drawn from any distribution: nothing depends on the choice but speed, and how many
drafts are accepted.
"""

from __future__ import annotations

import torch

from sglang_er.kernels import registry
from sglang_er.kernels.base import PackedWeight

FEWEST_ROWS = 64
"""On a GPU whose times are in no table: where bf16 products of an H100 or H200, by its data sheet, take as long as
reading the weight (64 rows at 0.53 bytes a weight, 4.3 TB/s and 60 % of 989 TFLOP/s)."""


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
