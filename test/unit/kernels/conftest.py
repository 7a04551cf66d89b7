"""Every instruction set of this machine as a parameter, and a generator seeded per test."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

from sglang_er import kernels


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in kernels.supported_isas():
        pytest.skip(f"this machine has no {request.param}")
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))
