"""Triton functions of RoAE's kernels: the tiles of a latent, of one head's weights and of its low-frequency pairs.

The pairs of a head are taken in two tiles: the last BLOCK_LOW of them, from pair SPLIT on, where the low-frequency
pairs are, and those before, which only rotate. SPLIT leaves both on wide boundaries.

The signal of the low tile comes out of one product with real parts and then imaginary ones side by side, and is used as
pairs, `[BLOCK_T, BLOCK_LOW, 2]`: one exchange between threads for both parts. (Two products, one for each part, look
chained to the compiler, which then does them twice over.)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from rosa_kernels.heads import load_pairs, load_rotary, store_pairs


class Shape(NamedTuple):
    """What a binary is made for. Each BLOCK is a power of 2, with room for what it holds."""

    HEADS: Any
    KEY_HEADS: Any
    HEAD_DIM: Any
    PAIRS: Any
    LOW_PAIRS: Any
    SPLIT: Any
    RANK: Any
    INTERLEAVED: Any
    ROTARY_STEP: Any
    BLOCK_T: Any
    BLOCK_HIGH: Any
    BLOCK_LOW: Any
    BLOCK_REST: Any
    BLOCK_R: Any
    BLOCK_S: Any
    HEAD_STAGES: Any
    COMPUTE: Any
    DOT: Any


@triton.jit
def load_rows(p, o_t, m_t, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows o_t of a dense matrix of COLUMNS, `[BLOCK_T, BLOCK]`."""
    o = tl.arange(0, BLOCK)[None, :]
    return tl.load(p + o_t[:, None] * COLUMNS + o, mask=m_t[:, None] & (o < COLUMNS), other=0.0)


@triton.jit
def store_rows(p, o_t, m_t, b_x, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[None, :]
    tl.store(p + o_t[:, None] * COLUMNS + o, b_x.to(p.dtype.element_ty), mask=m_t[:, None] & (o < COLUMNS))


@triton.jit
def _low_columns(shape):
    """Which of a head's n low-frequency pairs stands in each column of the low tile, and where there is one."""
    o = tl.arange(0, shape.BLOCK_LOW) - (shape.PAIRS - shape.LOW_PAIRS - shape.SPLIT)
    return o, (o >= 0) & (o < shape.LOW_PAIRS)


@triton.jit
def _packed_columns(shape):
    """Which of a head's d_low numbers stands in each column of a product, and where there is one."""
    o = tl.arange(0, 2 * shape.BLOCK_LOW)
    o_pair = o % shape.BLOCK_LOW - (shape.PAIRS - shape.LOW_PAIRS - shape.SPLIT)
    return (o // shape.BLOCK_LOW) * shape.LOW_PAIRS + o_pair, (o_pair >= 0) & (o_pair < shape.LOW_PAIRS)


@triton.jit
def load_low(p_row, m_t, shape):
    """A head's d_low numbers of every token, real parts and imaginary ones, `[BLOCK_T, BLOCK_LOW]` each."""
    o, m = _low_columns(shape)
    o, m = o[None, :], m_t[:, None] & m[None, :]
    return tl.load(p_row + o, mask=m, other=0.0), tl.load(p_row + (shape.LOW_PAIRS + o), mask=m, other=0.0)


@triton.jit
def store_low(p_row, b_re, b_im, m_t, shape):
    """The inverse of `load_low`."""
    o, m = _low_columns(shape)
    o, m = o[None, :], m_t[:, None] & m[None, :]
    tl.store(p_row + o, b_re.to(p_row.dtype.element_ty), mask=m)
    tl.store(p_row + (shape.LOW_PAIRS + o), b_im.to(p_row.dtype.element_ty), mask=m)


@triton.jit
def store_low_of_product(p_row, b_x, m_t, shape):
    """`store_low` of pairs that came out of a product: one exchange between threads instead of two."""
    o, m = _packed_columns(shape)
    tl.store(p_row + o[None, :], packed(b_x, shape).to(p_row.dtype.element_ty), mask=m_t[:, None] & m[None, :])


@triton.jit
def load_head_rows(w, i_head, shape):
    """One head's rows of a weight `[heads * d_low, rank]`, `[2 * BLOCK_LOW, BLOCK_R]`."""
    o, m = _packed_columns(shape)
    o_r = tl.arange(0, shape.BLOCK_R)[None, :]
    p = w + i_head * (2 * shape.LOW_PAIRS * shape.RANK)
    return tl.load(p + (o[:, None] * shape.RANK + o_r), mask=m[:, None] & (o_r < shape.RANK), other=0.0).to(shape.DOT)


@triton.jit
def load_head_columns(w, i_head, shape):
    """One head's columns of a weight `[rank, heads * d_low]`, `[BLOCK_R, 2 * BLOCK_LOW]`."""
    o, m = _packed_columns(shape)
    o_r = tl.arange(0, shape.BLOCK_R)[:, None]
    p = w + i_head * (2 * shape.LOW_PAIRS) + (o_r * (2 * shape.HEADS * shape.LOW_PAIRS) + o[None, :])
    return tl.load(p, mask=(o_r < shape.RANK) & m[None, :], other=0.0).to(shape.DOT)


@triton.jit
def product(b_latent, b_w, shape):
    """A latent `[BLOCK_T, BLOCK_R]` times one head's weight, `[BLOCK_R, 2 * BLOCK_LOW]`, as pairs.

    What stands beside a tile's own columns is 0 after a product too, where a NaN or infinity has met the zeros there:
    it must not reach the high-frequency pairs. Tiles without such columns cost nothing for that.
    """
    b_y = tl.dot(b_latent, b_w, input_precision="ieee", out_dtype=shape.COMPUTE)
    if shape.LOW_PAIRS < shape.BLOCK_LOW:
        _, m = _packed_columns(shape)
        b_y = tl.where(m[None, :], b_y, 0.0)
    return tl.permute(tl.reshape(b_y, (b_y.shape[0], 2, shape.BLOCK_LOW)), (0, 2, 1))


@triton.jit
def packed(b_x, shape):
    """Pairs with real parts and then imaginary ones side by side, `[BLOCK_T, 2 * BLOCK_LOW]`, as products have them."""
    return tl.reshape(tl.permute(b_x, (0, 2, 1)), (b_x.shape[0], 2 * shape.BLOCK_LOW))


@triton.jit
def load_low_rotary(rotary, t, shape):
    return load_rotary(rotary, t, shape.SPLIT, shape.PAIRS - shape.SPLIT, shape.BLOCK_LOW, shape)


@triton.jit
def load_low_tile(p_row, stride_d, m_t, shape):
    COUNT: tl.constexpr = shape.PAIRS - shape.SPLIT
    return load_pairs(p_row, stride_d, m_t, shape.SPLIT, COUNT, shape.BLOCK_LOW, shape.PAIRS, shape.INTERLEAVED)


@triton.jit
def store_low_tile(p_row, stride_d, b_re, b_im, m_t, shape):
    COUNT: tl.constexpr = shape.PAIRS - shape.SPLIT
    store_pairs(p_row, stride_d, b_re, b_im, m_t, shape.SPLIT, COUNT, shape.BLOCK_LOW, shape.PAIRS, shape.INTERLEAVED)


@triton.jit
def load_high_tile(p_row, stride_d, rotary, t, shape):
    """The pairs of a head that only rotate, and their cos and sin, `[BLOCK_T, BLOCK_HIGH]` each.

    cos and sin are read for every head, from cache: kept, they would cost 32 registers.
    """
    if shape.SPLIT > 0:
        b_re, b_im = load_pairs(p_row, stride_d, t.m, 0, shape.SPLIT, shape.BLOCK_HIGH, shape.PAIRS, shape.INTERLEAVED)
        b_cos, b_sin = load_rotary(rotary, t, 0, shape.SPLIT, shape.BLOCK_HIGH, shape)
        return b_re, b_im, b_cos, b_sin
    else:
        return 0, 0, 0, 0


@triton.jit
def store_high_tile(p_row, stride_d, b_re, b_im, m_t, shape):
    store_pairs(p_row, stride_d, b_re, b_im, m_t, 0, shape.SPLIT, shape.BLOCK_HIGH, shape.PAIRS, shape.INTERLEAVED)
