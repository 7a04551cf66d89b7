"""fp8 numbers as operands: exact in every type, subnormal ones too."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sglang_er.kernels.triton.fp8 import converted_fp8, converts_fp8, fp8_operand
from sglang_er.kernels.triton.rounding import emulated

CODES = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
NUMBERS = CODES.view(torch.float8_e4m3fn).float()


@triton.jit
def _decode(codes, out, count, DTYPE: tl.constexpr, CONVERTED: tl.constexpr, EMULATED: tl.constexpr):
    at = tl.arange(0, 256)
    block = tl.load(codes + at, mask=at < count, other=0)
    numbers = converted_fp8(block, DTYPE, EMULATED) if CONVERTED else fp8_operand(block, DTYPE, EMULATED)
    tl.store(out + at, numbers.to(tl.float32), mask=at < count)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float16, tl.float32], ids=str)
def test_every_number_is_exact(dtype, converted):
    out = torch.full((256,), float("nan"))
    _decode[(1,)](CODES, out, len(CODES), DTYPE=dtype, CONVERTED=converted, EMULATED=emulated())
    assert torch.equal(out[: len(CODES)].view(torch.int32), NUMBERS.view(torch.int32))  # the sign of zero, too
    assert out[len(CODES) :].isnan().all()


def test_bits_of_a_gpus_bf16():
    """The interpreter has no bf16 arithmetic: the same shift and product in torch."""
    shifted = (CODES.view(torch.int8).to(torch.int16) << 4) & -30736
    assert torch.equal(shifted.view(torch.bfloat16) * 2.0**120, NUMBERS.bfloat16())


@pytest.mark.parametrize(("capability", "converts"), [((8, 0), False), ((8, 9), True), ((9, 0), True)], ids=str)
def test_who_converts(monkeypatch, capability, converts):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert converts_fp8.__wrapped__(torch.device("cuda", 0)) == converts
    assert not converts_fp8(torch.device("cpu"))
