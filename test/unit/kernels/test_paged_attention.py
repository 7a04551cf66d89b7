"""paged_attention against the reference in fp64, over pools poisoned with NaN, for every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_pool import PagedPool, random_pool

from sglang_er import kernels
from sglang_er.kernels import paged_attention

# Error allowed per output: a score is off by fp32 rounding of its products, an output by that times the values.
ACCUMULATION = 2.0**-23
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DECODE = [(700, 1), (1, 1), (513, 1)]
VERIFY = [(600, 5), (5, 5), (512, 3)]
PREFILL = [(150, 150), (530, 70), (33, 1), (40, 0)]


def attend(pool: PagedPool, window: int = -1, **kwargs) -> torch.Tensor:
    return paged_attention(*pool.args(), scale=pool.q.shape[-1] ** -0.5, window=window, **kwargs)


def check(pool: PagedPool, window: int = -1, out: torch.Tensor | None = None) -> torch.Tensor:
    expected = attend(pool.double(), window, implementation="reference")
    if out is None:
        out = torch.full(expected.shape, float("nan"), dtype=pool.q.dtype)
    actual = attend(pool, window, out=out)
    assert actual is out
    if expected.numel() == 0:
        return actual
    norms = [float(tensor.double().nan_to_num(0.0).norm(dim=2).max()) for tensor in (pool.q, pool.keys)]
    magnitude = 1 + pool.q.shape[2] ** -0.5 * norms[0] * norms[1]  # of the terms of a score
    largest = float(pool.values.nan_to_num(0.0).abs().max())
    bound = ACCUMULATION * magnitude * largest + ROUNDING[out.dtype] * expected.abs()
    worst = ((actual.double() - expected).abs() / bound).max()
    assert worst <= 1, f"error is {worst:.2f} times the bound"  # NaN fails too
    return actual


@pytest.mark.parametrize("requests", [DECODE, VERIFY, PREFILL], ids=["decode", "verify", "prefill"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (14, 2), (8, 1)], ids=str)
def test_equals_reference(isa, generator, heads, requests):
    check(random_pool(generator, requests, heads=heads[0], kv_heads=heads[1]))


@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 80), (96, 72), (128, 128), (40, 256), (256, 24)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dimensions_and_pool_dtypes(isa, generator, dtype, dims):
    check(random_pool(generator, [(70, 3), (17, 17)], head_dim=dims[0], value_dim=dims[1], dtype=dtype))


@pytest.mark.parametrize("q_dtype", DTYPES)
def test_query_and_output_dtypes(isa, generator, q_dtype):
    pool = random_pool(generator, VERIFY, q_dtype=q_dtype)
    rounded = check(pool)
    exact = check(pool, out=torch.full(rounded.shape, float("nan")))
    assert exact.dtype == torch.float32 and torch.equal(exact.to(q_dtype), rounded)


@pytest.mark.parametrize("window", [0, 1, 15, 16, 100, 511, 512, 2000])
@pytest.mark.parametrize("requests", [DECODE, VERIFY, PREFILL], ids=["decode", "verify", "prefill"])
def test_windows(isa, generator, requests, window):
    check(random_pool(generator, requests, window=window), window)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_strided_tensors_and_pages(isa, generator, page_size):
    pool = random_pool(generator, [(200, 2), (50, 50)], page_size=page_size, strided=True, q_dtype=torch.bfloat16)
    wide = torch.full((52, 4 * 64 + 40), float("nan"), dtype=torch.bfloat16)
    check(pool, out=wide[:, 16 : 16 + 256].unflatten(1, (4, 64)))
    assert wide[:, :16].isnan().all() and wide[:, 272:].isnan().all()  # nothing written beside the output


@pytest.mark.parametrize("window", [-1, 70])
def test_batch_width_and_threads_do_not_matter(isa, generator, window):
    """The promise behind verification: a token decoded alone and one verified among others get the same bits."""
    requests = [(700, 70), (5, 5), (1300, 4), (64, 1), (513, 3)]
    pool = random_pool(generator, requests, heads=6, kv_heads=2, window=window)
    whole = attend(pool, window)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        assert torch.equal(attend(pool, window), whole)
    for index, (context, queries) in enumerate(requests):
        own = whole[pool.query_begin[index] : pool.query_begin[index + 1]]
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(attend(pool.request(index), window), own)
            for back in {0, 1, 3, queries - 1} & set(range(queries)):
                for width in {1, 2, 5} & set(range(1, queries - back + 1)):
                    one = attend(pool.request(index, width, context - back), window)
                    assert torch.equal(one, own[queries - back - width : queries - back]), (index, back, width)


def test_slots_in_any_order_give_the_same_bits(isa, generator):
    pool = random_pool(generator, VERIFY)
    order = torch.randperm(len(pool.keys), generator=generator)
    keys, values = torch.empty_like(pool.keys), torch.empty_like(pool.values)
    keys[order], values[order] = pool.keys, pool.values
    used = pool.req_to_token.clamp(max=len(order) - 1)
    moved = replace(pool, keys=keys, values=values, req_to_token=order[used.long()].to(torch.int32))
    assert torch.equal(attend(moved), attend(pool))


def test_later_tokens_that_are_not_finite_stay_unseen(isa, generator):
    """A masked key has weight 0, but 0 * NaN would be NaN: it must not be touched at all."""
    pool = random_pool(generator, [(600, 40), (20, 20)], heads=6)
    clean = attend(pool)
    for index, first in ((0, 580), (1, 7)):
        slots = pool.slots(index)[first:]
        pool.keys[slots], pool.values[slots] = float("nan"), float("inf")
    out = attend(pool)
    assert torch.equal(out[:20], clean[:20]) and torch.equal(out[40:47], clean[40:47])
    assert out[20:40].isnan().all() and out[47:].isnan().all()


def test_query_that_is_not_finite_stays_alone(isa, generator):
    pool = random_pool(generator, VERIFY)
    clean = attend(pool)
    pool.q[2, 1, 5] = float("nan")
    out = attend(pool)
    assert out[2, 1].isnan().all()
    out[2, 1] = clean[2, 1]
    assert torch.equal(out, clean)


def test_large_scores_do_not_overflow(isa, generator):
    pool = random_pool(generator, [(100, 2)])
    out = attend(replace(pool, q=pool.q * 1e4))
    best = attend(replace(pool, q=pool.q.double() * 1e4), implementation="reference")
    assert (out.double() - best).abs().max() < 1e-2


def test_no_requests_and_no_queries(generator):
    pool = random_pool(generator, [(30, 0), (20, 0)])
    assert attend(pool).shape == (0, 4, 64)
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = replace(pool, rows=nothing, context_lens=nothing, query_begin=torch.zeros(1, dtype=torch.int64))
    with torch.inference_mode():
        assert attend(empty).shape == (0, 4, 64)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_fuzz(data):
    draw = data.draw
    requests = draw(st.lists(st.tuples(st.integers(1, 1100), st.integers(0, 40)), min_size=1, max_size=4))
    requests = [(context, min(context, queries)) for context, queries in requests]
    kv_heads = draw(st.integers(1, 3))
    window = draw(st.sampled_from([-1, -1, 0, 3, 64, 600]))
    pool = random_pool(
        torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        requests,
        heads=kv_heads * draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(1, 16)),
        value_dim=8 * draw(st.integers(1, 16)),
        dtype=draw(st.sampled_from(DTYPES)),
        window=window,
        strided=draw(st.booleans()),
    )
    before = kernels.isa()
    kernels.set_isa(draw(st.sampled_from(kernels.supported_isas())))
    try:
        check(pool, window)
    finally:
        kernels.set_isa(before)


def broken(name, value):
    return lambda pool: replace(pool, **{name: value(getattr(pool, name))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("q", lambda q: q[0]), "q has shape .* expected three"),
        (broken("q", lambda q: q[:, :3]), "q has shape"),
        (broken("q", lambda q: q[:, :, ::2]), "must be contiguous"),
        (broken("q", lambda q: q.int()), "int32"),
        (broken("q", lambda q: q.double()), "float64"),
        (broken("keys", lambda k: k.double()), "keys is torch.float64"),
        (broken("keys", lambda k: k[:, :, :60].contiguous()), "head_dim 60 is not a multiple of 8"),
        (broken("keys", lambda k: k[:, :, :56].contiguous()), "q has shape"),
        (broken("values", lambda v: v.half()), "values is torch.float16"),
        (broken("values", lambda v: v[:, :, :60].contiguous()), "value_dim 60 is not a multiple of 8"),
        (broken("values", lambda v: v[1:]), "values has shape"),
        (broken("req_to_token", lambda t: t.long()), "req_to_token is torch.int64"),
        (broken("rows", lambda r: r.int()), "rows is torch.int32"),
        (broken("rows", lambda r: r + 99), "request 0 has row 1..?, req_to_token has 4 rows"),
        (broken("rows", lambda r: r - 99), "request 0 has row -"),
        (broken("query_begin", lambda b: b[:-1]), "query_begin is"),
        (broken("query_begin", lambda b: b + 1), "query_begin must rise from 0"),
        (broken("query_begin", lambda b: torch.tensor([0, 9, 7])), "query_begin must rise from 0"),
        (broken("context_lens", lambda c: c[:1]), "context_lens is"),
        (broken("context_lens", lambda c: c - 27), "request 0 has context_len 3, expected 4"),
        (broken("context_lens", lambda c: c + 9), "request 0 has context_len 39"),
        (broken("req_to_token", lambda t: t - 9), "uses slot -"),
        (broken("req_to_token", lambda t: t + 40), "request 0 uses slot .*, the pool has 53"),
        (broken("keys", lambda k: k.to("meta")), "keys is on meta"),
    ],
)
def test_bad_input_is_one_line(generator, change, message):
    pool = random_pool(generator, [(30, 4), (20, 3)])
    with pytest.raises((ValueError, TypeError), match=message) as error:
        attend(change(pool))
    assert "\n" not in str(error.value)


def test_bad_out(generator):
    pool = random_pool(generator, [(30, 4)])
    with pytest.raises(ValueError, match="out has shape"):
        attend(pool, out=torch.zeros(4, 4, 32))
    with pytest.raises(TypeError, match=r"out is torch\.bfloat16"):
        attend(pool, out=torch.zeros(4, 4, 64, dtype=torch.bfloat16))
