"""w4a16_experts on CPUs: plain torch and the compiled products against the formula in fp64; what the op refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.mixtures import ROUNDING, Mixture, mixture, truth
from support.properties import examples

from sglang_er.kernels import MarlinWeight, PackedWeight, quantize_pack, w4a16_experts

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IMPLEMENTATIONS = ["reference", "cpu"]
SIZES = (48, 40, 5)


def check(of: Mixture, implementation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    # gate, up, silu and the product are rounded one by one on a CPU
    expected, bound = truth(of, 4 * ROUNDING[of.x.dtype])
    out = torch.full_like(of.x, float("nan")) if out is None else out
    got = w4a16_experts(*of, out, implementation=implementation)
    assert got is out
    worst = float(((out.double() - expected).abs() / bound).amax()) if out.numel() else 0.0
    assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_equals_the_formula(tokens: int, implementation: str, dtype: torch.dtype) -> None:
    check(mixture(tokens, SIZES, 2, 32, dtype, seed=tokens), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(st.integers(0, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.sampled_from([32, 64, 128]))
@examples(25, shrink=False)
def test_any_shape(implementation: str, tokens: int, inner: int, count: int, choices: int, group: int) -> None:
    check(mixture(tokens, (16 * inner, 24, count), choices, group, seed=tokens + inner), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_lie_any_distance_apart_and_nothing_is_written_beside(implementation: str) -> None:
    of = mixture(6, SIZES, 3, 32, seed=1)
    wide = torch.full((6, 80), float("nan"))
    experts, weights = (torch.cat([part, part], dim=1)[:, 1:4] for part in (of.experts, of.weights))
    x = torch.cat([of.x, of.x], dim=1)[:, 7:55]
    check(of._replace(x=x, experts=experts, weights=weights), implementation, out=wide[:, 16:64])
    assert wide[:, :16].isnan().all() and wide[:, 64:].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_stays_in_its_row(implementation: str) -> None:
    of = mixture(6, SIZES, 2, 32, seed=2, others=0.0)
    expected = check(of, implementation).clone()
    x = of.x.clone()
    x[2, 5] = float("nan")
    got = w4a16_experts(*of._replace(x=x), implementation=implementation)
    assert got[2].isnan().all()
    got[2] = expected[2]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_that_nobody_chose_is_not_seen(implementation: str) -> None:
    """Its weights may hold anything, as those of a layer that is being received do."""
    of = mixture(6, SIZES, 2, 32, seed=3)
    expected = w4a16_experts(*of._replace(experts=of.experts.clamp_max(3)), implementation=implementation)
    of.down.rows(4 * 48, 48).scales_zeros.fill_(float("nan"))
    got = w4a16_experts(*of._replace(experts=of.experts.clamp_max(3)), implementation=implementation)
    assert torch.equal(got, expected) and got.isfinite().all()


def test_the_reference_takes_fp64() -> None:
    of = mixture(5, SIZES, 2, 32, seed=4)
    got = w4a16_experts(*of._replace(x=of.x.double()), implementation="reference")
    torch.testing.assert_close(got, truth(of)[0], rtol=1e-12, atol=1e-13)


def test_no_choice_gives_nothing() -> None:
    of = mixture(3, SIZES, 2, 32)
    got = w4a16_experts(*of._replace(experts=of.experts[:, :0], weights=of.weights[:, :0]))
    assert torch.equal(got, torch.zeros(3, 48))


def test_a_mixture_of_a_slice_is_that_of_its_tokens() -> None:
    """A row's result does not depend on the other rows, bit for bit."""
    of = mixture(17, SIZES, 2, 32, torch.bfloat16, seed=5)
    whole = w4a16_experts(*of)
    for rows in (slice(3, 4), slice(0, 9)):
        part = of._replace(x=of.x[rows], experts=of.experts[rows], weights=of.weights[rows])
        assert torch.equal(w4a16_experts(*part), whole[rows])


def packed(rows: int, cols: int) -> PackedWeight:
    return quantize_pack(torch.ones(rows, cols), 32)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda of: {"x": of.x[:, :32]}, ValueError, r"x has shape \[3, 32\], expected \[any, 48\]"),
        (lambda of: {"down": packed(5 * 32, 40)}, ValueError, r"not \[count \* 2 \* I, K\] and \[count \* K, I\]"),
        (lambda of: {"down": packed(5 * 48, 32)}, ValueError, r"not \[count \* 2 \* I, K\]"),
        (
            lambda of: {"gate_up": packed(2 * 36, 48), "down": packed(48, 36)},
            ValueError,
            "experts of 72 and 48 rows are not whole blocks of 16",
        ),
        (lambda of: {"down": MarlinWeight.empty(64, 128, 32)}, TypeError, "weights in our own layout"),
        (lambda of: {"experts": of.experts[:2]}, ValueError, r"experts has shape \[2, 2\]"),
        (lambda of: {"experts": of.experts.float()}, TypeError, "experts is torch.float32"),
        (lambda of: {"weights": of.weights[:, :1]}, ValueError, r"weights has shape \[3, 1\]"),
        (lambda of: {"weights": of.weights.half()}, TypeError, "weights is torch.float16"),
        (lambda of: {"experts": of.experts.to("meta")}, ValueError, "experts is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[Mixture], dict[str, Any]], error: type[Exception], match: str
) -> None:
    of = mixture(3, SIZES, 2, 32)
    with pytest.raises(error, match=match):
        w4a16_experts(*of._replace(**change(of)))
