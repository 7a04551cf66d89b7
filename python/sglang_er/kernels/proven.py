"""What was seen correct on a GPU, and may therefore be chosen there without being asked for.

docs/gpu-status.md says the same with dates; a test compares them.
"""

from __future__ import annotations

GPU = ("cuda", "triton", "marlin")  # implementations that it is about
# (op, implementation)
KERNELS: frozenset[tuple[str, str]] = frozenset()
DRAFT_GRAPHS = False
KV_SHADOW = False
