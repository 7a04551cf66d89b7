from __future__ import annotations

from functools import partial

from sglang_er.kernels.cpu.sample_rows import sample_rows
from sglang_er.kernels.reference import verify_chain as reference

# What costs is the draw from a row of the vocabulary.
verify_chain = partial(reference.verify_chain, draw=sample_rows)
