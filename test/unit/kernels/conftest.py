"""Every instruction set of this machine as a parameter, and a generator seeded per test."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

from sglang_er import kernels


@pytest.fixture(params=["amx", "avx512_bf16", "avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in kernels.supported_isas():
        pytest.skip(f"this machine has no {request.param}")
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These sizes need no second thread, and waking one is slow on a busy machine; tests of threads set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(request.node.nodeid.encode()))
