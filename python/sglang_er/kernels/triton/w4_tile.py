"""fp32 products of a tile of an int4 weight with a block of rows of x; what the kernels of packed weights share.

Layout: csrc/include/sglang_er/packed_weight.h. A group is cut into chunks of at most 128 inputs of one scale; a step
takes 8 chunks, one a warp, as the batch of a batched product. Bits 4i and 16 + 4i of a word are neighbours k, k+1, so
the words of a chunk, joined by halves, are four tiles whose inputs lie side by side, with no shuffle of nibbles. In a
chunk sum x W = scale * sum(level x) + zero * sum(x); the second sum is a product with ones, which puts it where the
first one is.

Accuracy: levels are exact, products exact in fp32 for 16-bit x. For x below 2**112 the error is at most
2**-19 * sum_k |x_k| (15 scale + |zero|), plus rounding to x's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLOTS = 8  # chunks a step, and warps
# The interpreter has no bf16 arithmetic: it multiplies the same values in fp32, where they are exact too.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _levels(nibbles: tl.tensor, like: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    """Integers 0..15 in the type of `like`: the mantissa of 128 + q or 1024 + q, less that offset (exact)."""
    if like.dtype == tl.float32:
        return nibbles.to(tl.float32)
    elif like.dtype == tl.float16:
        return (nibbles | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - 1024.0
    else:
        shifted = (nibbles | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        if UPCAST:
            shifted = shifted.to(tl.float32)
        return shifted - 128.0


@triton.jit
def _add_halves(total: tl.tensor, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr) -> tl.tensor:
    """total[:HALF] + total[HALF:]; tl.sum would leave the order to the tile's shape, and so to the number of rows."""
    first, second = tl.split(tl.permute(tl.reshape(total, (2, HALF, BLOCK_N, BLOCK_M)), (1, 2, 3, 0)))
    return first + second


@triton.jit
def tile_product(
    x_rows: tl.tensor,
    m_live: tl.tensor,
    packed: tl.tensor,
    scales_zeros: tl.tensor,
    n: tl.tensor,
    n_live: tl.tensor,
    K: tl.tensor,
    first_step: tl.tensor,
    last_step: tl.tensor,
    GROUP: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """fp32 [BLOCK_N, BLOCK_M]: rows n of a weight times the rows of x that begin at `x_rows`, over some steps."""
    WORDS: tl.constexpr = GROUP // 8
    CHUNKS: tl.constexpr = (WORDS + CHUNK_WORDS - 1) // CHUNK_WORDS
    WIDTH: tl.constexpr = 2 * CHUNK_WORDS

    groups = tl.cdiv(K, GROUP)
    block, lane = n // 16, n % 16
    word = tl.arange(0, CHUNK_WORDS)
    column = tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    tile_words = packed + (block * groups * (WORDS * 16) + lane)
    tile_scales = scales_zeros + (block * groups * 32 + lane)

    total = tl.zeros((SLOTS, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first_step, last_step):
        chunk = step * SLOTS + slot
        group = chunk // CHUNKS
        first = (chunk % CHUNKS) * CHUNK_WORDS
        live = group < groups
        in_group = first[:, None] + word
        words = tl.load(
            tile_words[None, :, None] + (group[:, None] * (WORDS * 16) + in_group * 16)[:, None, :],
            mask=(live[:, None] & (in_group < WORDS))[:, None, :] & n_live[None, :, None],
            other=0,
        )
        scale_at = tile_scales[None, :] + group[:, None] * 32
        scale_live = live[:, None] & n_live[None, :]
        scale = tl.load(scale_at, mask=scale_live, other=0.0).to(tl.float32)
        zero = tl.load(scale_at + 16, mask=scale_live, other=0.0).to(tl.float32)

        product = tl.zeros((SLOTS, BLOCK_N, BLOCK_M), tl.float32)
        sums = tl.zeros((SLOTS, 16, BLOCK_M), tl.float32)
        offset = 2 * first[:, None] + column
        for position in tl.static_range(4):
            k = (group * GROUP + position * (GROUP // 4))[:, None] + offset
            k_live = live[:, None] & (offset < GROUP // 4) & (k < K)
            values = tl.load(
                x_rows[None, None, :] + k[:, :, None],
                mask=k_live[:, :, None] & m_live[None, None, :],
                other=0.0,
            )
            low = (words >> (4 * position)) & 15
            high = (words >> (16 + 4 * position)) & 15
            levels = _levels(tl.reshape(tl.join(low, high), (SLOTS, BLOCK_N, WIDTH)), values, UPCAST)
            if UPCAST:
                values = values.to(tl.float32)
            product = tl.dot(levels, values, product, input_precision="ieee")
            ones = tl.full((SLOTS, 16, WIDTH), 1.0, values.dtype)
            sums = tl.dot(ones, values, sums, input_precision="ieee")
        # All 16 rows of sums are equal.
        x_sum = tl.sum(tl.where(tl.arange(0, 16)[None, :, None] == 0, sums, 0.0), axis=1)
        total = tl.fma(scale[:, :, None], product, total)
        total = tl.fma(zero[:, :, None], x_sum[:, None, :], total)

    total = _add_halves(total, SLOTS // 2, BLOCK_N, BLOCK_M)
    total = _add_halves(total, SLOTS // 4, BLOCK_N, BLOCK_M)
    total = _add_halves(total, SLOTS // 8, BLOCK_N, BLOCK_M)
    return tl.reshape(total, (BLOCK_N, BLOCK_M))


def chunk_words(group_size: int) -> int:
    """Words of a chunk, a power of two; 8 is the least that a product takes (16 inputs)."""
    return min(16, max(8, triton.next_power_of_2(group_size // 8)))


def steps_of(in_features: int, group_size: int) -> int:
    chunks = triton.cdiv(group_size // 8, chunk_words(group_size))
    return int(triton.cdiv(triton.cdiv(in_features, group_size) * chunks, SLOTS))
