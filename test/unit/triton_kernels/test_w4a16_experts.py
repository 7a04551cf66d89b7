"""Triton's w4a16_experts against the formula in fp64, on poisoned outputs; its plan of blocks by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.mixtures import Mixture, mixture, truth
from support.properties import examples

pytest.importorskip("triton")

from sglang_er.kernels.triton import w4a16_experts as module
from sglang_er.kernels.triton.w4a16_experts import block_of, most_blocks, plan_constants, w4a16_experts

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = (48, 40, 5)


def run(of: Mixture, out: torch.Tensor | None = None) -> torch.Tensor:
    """Into NaN; and what is allocated within is full of what no result may depend on: NaN, and indices far outside."""
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 29)

    out = torch.full_like(of.x, float("nan")) if out is None else out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        w4a16_experts(*of, out)
    return out


def check(of: Mixture, out: torch.Tensor | None = None) -> torch.Tensor:
    expected, bound = truth(of)
    out = run(of, out)
    worst = float(((out.double() - expected).abs() / bound).amax())
    assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 29])
def test_equals_the_formula(tokens: int, dtype: torch.dtype) -> None:
    check(mixture(tokens, SIZES, 2, 32, dtype, seed=tokens))


@pytest.mark.parametrize(
    ("group", "dtype"), [(32, torch.bfloat16), (64, torch.float16), (96, torch.float32), (128, torch.bfloat16)]
)
def test_odd_sizes(group: int, dtype: torch.dtype) -> None:
    """Last groups that are not full, tiles half outside, inner sizes that are no multiple of 16."""
    check(mixture(5, (176, 72, 3), 2, group, dtype, seed=group))


def test_several_steps() -> None:
    """More than 8 chunks of 128 inputs."""
    check(mixture(3, (1200, 24, 2), 1, 128, torch.float16, seed=6))


@pytest.mark.parametrize("tokens", [1, 20])
def test_all_tokens_at_one_expert(tokens: int) -> None:
    of = mixture(tokens, SIZES, 1, 32, torch.float16, seed=7)
    check(of._replace(experts=torch.full_like(of.experts, 3)))


def test_one_expert_alone() -> None:
    check(mixture(9, (32, 16, 1), 1, 32, torch.float16, seed=8))


def test_an_expert_twice_in_a_row_counts_twice() -> None:
    of = mixture(4, SIZES, 2, 32, seed=9, others=0.0)
    check(of._replace(experts=of.experts[:, :1].repeat(1, 2)))


def test_only_experts_of_other_ranks_give_zero() -> None:
    of = mixture(7, SIZES, 2, 32, seed=10)
    assert torch.equal(run(of._replace(experts=torch.full_like(of.experts, -1))), torch.zeros(7, 48))


def test_int64_experts_and_weights_of_the_dtype_of_x() -> None:
    of = mixture(7, SIZES, 2, 32, torch.float16, seed=11)
    check(of._replace(experts=of.experts.long(), weights=of.weights.half()))


def test_experts_that_nobody_chose_are_not_read() -> None:
    of = mixture(7, SIZES, 2, 32, torch.float16, seed=12)
    of = of._replace(experts=of.experts.clamp_max(3))
    expected = run(of)
    for weight, rows in ((of.gate_up, 80), (of.down, 48)):
        weight.rows(4 * rows, rows).scales_zeros.fill_(float("nan"))
    assert torch.equal(run(of), expected) and expected.isfinite().all()


def test_rows_lie_any_distance_apart_and_nothing_is_written_beside() -> None:
    of = mixture(6, SIZES, 3, 32, seed=13)
    wide = torch.full((6, 80), float("nan"))
    experts, weights = (torch.cat([part, part], dim=1)[:, 1:4] for part in (of.experts, of.weights))
    x = torch.cat([of.x, of.x], dim=1)[:, 7:55]
    check(of._replace(x=x, experts=experts, weights=weights), out=wide[:, 16:64])
    assert wide[:, :16].isnan().all() and wide[:, 64:].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.bfloat16), (float("inf"), torch.float32)])
def test_a_row_that_is_not_finite_stays_alone(value: float, dtype: torch.dtype) -> None:
    of = mixture(6, SIZES, 2, 32, dtype, seed=14, others=0.0)
    expected, x = run(of), of.x.clone()
    x[2, 11] = value
    got = run(of._replace(x=x))
    assert not got[2].isfinite().any()
    got[2] = expected[2]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Bit for bit, in other places and in blocks of another size.

    In bf16: sums within a product are exact for these values then. Their order is the interpreter's BLAS here, which
    has another one for every size of a block, and a tensor core's there."""
    of = mixture(29, SIZES, 2, 32, dtype, seed=15)
    of = of._replace(x=((of.x.float() * 4).round() / 4).to(dtype))
    whole = run(of)
    for rows in (torch.tensor([4]), torch.arange(29).flip(0), torch.tensor([20, 3, 7, 28, 11])):
        part = of._replace(x=of.x[rows], experts=of.experts[rows], weights=of.weights[rows])
        if dtype == torch.bfloat16:
            assert torch.equal(run(part), whole[rows])
        else:
            torch.testing.assert_close(run(part), whole[rows], rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(DTYPES),
    st.floats(0, 1),
)
@examples(20, shrink=False)
def test_any_shape(
    tokens: int, rows: int, count: int, choices: int, group: int, dtype: torch.dtype, others: float
) -> None:
    check(mixture(tokens, (16 * rows, 8 * rows, count), choices, group, dtype, seed=tokens + count, others=others))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.sampled_from([8, 16, 32]), st.data())
@examples(40, shrink=False)
def test_the_plan_has_every_pair_once(tokens: int, count: int, choices: int, block_m: int, data: st.DataObject) -> None:
    """In blocks of one expert each, as few as there can be, at the head of the table."""
    favourite = data.draw(st.integers(-1, count - 1))
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.randint(-1, count, (tokens, choices), generator=generator, dtype=torch.int32)
    experts[torch.rand(tokens, choices, generator=generator) < 0.5] = favourite
    pairs, table = tokens * choices, most_blocks(tokens * choices, count, block_m)
    constants = plan_constants(pairs, count, block_m)
    cursors, order, blocks = (torch.empty(size, dtype=torch.int32) for size in (constants["BINS"], pairs, 3 * table))
    sizes = (pairs, choices, experts.stride(0), count, table)
    module.plan_kernel[(1,)](experts, cursors, order, blocks, *sizes, **constants)
    owners, begins, ends = blocks.view(3, -1).tolist()
    used = sum(owner >= 0 for owner in owners)
    assert all(owner == -1 for owner in owners[used:])
    flat, seen, sizes_of = experts.flatten().tolist(), [], {}
    for owner, begin, end in zip(owners[:used], begins, ends):
        inside = order[begin:end].tolist()
        assert 0 < len(inside) <= block_m and all(flat[pair] == owner for pair in inside)
        sizes_of.setdefault(owner, []).append(len(inside))
        seen += inside
    assert sorted(seen) == [pair for pair, expert in enumerate(flat) if expert >= 0]
    assert all(size == block_m for sizes in sizes_of.values() for size in sizes[:-1])


def test_blocks_are_as_small_as_decode_needs() -> None:
    assert block_of(8, 128, torch.bfloat16)[0] == block_of(8 * 64, 128, torch.bfloat16)[0] == 8
    assert block_of(8 * 128, 128, torch.bfloat16)[0] == 16
    assert most_blocks(8, 128, 8) == 8 and most_blocks(8 * 64, 128, 8) == 176
