"""Serving does not wait for a compiler: batches of all sizes launch the same few variants of a kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "support/launch_keys.py"

# Of rows 1 to 16, for int8 up to 129, and draft lengths 1 to 7. More than one only where a kernel is another one: by
# its tile (8 rows and more), with something to subtract or without, by the width of the chain, for blocks of 8, 16, 32
# or 64 rows, by the size of a step of the plan, gated or not, and for the first and the last launch of a search.
MOST = {
    "softmax_rows": {"_measure": 1, "_normalize": 2},
    "draft_sample": {"_measure": 1, "narrow": 3, "_finish": 2},
    "choose_seeded": {"_choose": 1},
    "sample_rows": {"_weigh": 2, "_pick": 2},
    "verify_chain": {"_verify": 3},
    "w4a16_experts": {"plan_kernel": 2, "product_kernel": 2, "combine_kernel": 1},
    "w4a16_linear": {"linear_kernel": 2},
    "w4a8_linear": {"quantize_kernel": 1, "linear_kernel": 3},
}


def test_a_sweep_of_batches_compiles_few_variants():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == MOST
