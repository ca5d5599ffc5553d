"""Triton functions that load, rotate and store one head of a block of tokens, for every rotary layout.

Names in the kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values;
t token, l position in the sequence, b batch, h head, d element of a head.

A `shape` is a NamedTuple of constants, each kernel's own; here it needs HEAD_DIM, PAIRS, ROTARY_STEP (2 where every
value of cos stands twice), BLOCK_REST and COMPUTE, the dtype of all arithmetic.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Heads(NamedTuple):
    """A tensor `[b, h, l, d]` and its strides. An empty tensor stands for none."""

    p: Any
    b: Any
    h: Any
    l: Any  # noqa: E741
    d: Any


class Rotary(NamedTuple):
    """cos and sin, one column a pair, and the strides of their rows."""

    cos: Any
    sin: Any
    cos_row: Any
    sin_row: Any


class Tokens(NamedTuple):
    """A block of tokens: numbers and mask `[BLOCK_T]`, the sequence and the position of each, its row of cos."""

    o: Any
    m: Any
    b: Any
    l: Any  # noqa: E741
    row: Any


@triton.jit
def token_block(i_block, tokens, seq, cos_rows, BLOCK_T: tl.constexpr):
    """Tokens i_block * BLOCK_T and on; cos has one row a position, or one a token."""
    o_t = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    return Tokens(
        o_t.to(tl.int64), o_t < tokens, (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64),
        (o_t % cos_rows).to(tl.int64),
    )  # fmt: skip


@triton.jit
def head_rows(x, i_h, t):
    """Pointers to the first element of head i_h for every token of the block, `[BLOCK_T, 1]`, in 64 bits."""
    return x.p + (t.b * x.b + t.l * x.l + tl.cast(i_h, tl.int64) * x.h)[:, None]


@triton.jit
def load_rotary(rotary, t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, shape):
    """cos and sin of pairs FIRST to FIRST + COUNT for every token of the block, `[BLOCK_T, BLOCK]` each."""
    b_cos = _load_rotary(rotary.cos + t.row[:, None] * rotary.cos_row, t.m, FIRST, COUNT, BLOCK, shape.ROTARY_STEP)
    b_sin = _load_rotary(rotary.sin + t.row[:, None] * rotary.sin_row, t.m, FIRST, COUNT, BLOCK, shape.ROTARY_STEP)
    return b_cos, b_sin


@triton.jit
def _load_rotary(p_row, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    if STEP == 2:  # every value stands twice: a wide load, half of it dropped
        o = tl.arange(0, 2 * BLOCK)[None, :]
        b_x = tl.load(p_row + (2 * FIRST + o), mask=m_t[:, None] & (o < 2 * COUNT), other=0.0)
        b_x, _ = tl.split(tl.reshape(b_x, (m_t.shape[0], BLOCK, 2)))
    else:
        o = tl.arange(0, BLOCK)[None, :]
        b_x = tl.load(p_row + (FIRST + o), mask=m_t[:, None] & (o < COUNT), other=0.0)
    return b_x


@triton.jit
def load_pairs(
    p_row, stride_d, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Real and imaginary parts of pairs FIRST to FIRST + COUNT of a head, `[BLOCK_T, BLOCK]` each."""
    if INTERLEAVED:
        # One wide load and a split in registers: two gathers with stride 2 would be 16-bit accesses.
        o_d = tl.arange(0, 2 * BLOCK)[None, :]
        b_x = tl.load(p_row + (2 * FIRST + o_d) * stride_d, mask=m_t[:, None] & (o_d < 2 * COUNT), other=0.0)
        b_re, b_im = tl.split(tl.reshape(b_x, (m_t.shape[0], BLOCK, 2)))
    else:
        o_d = tl.arange(0, BLOCK)[None, :]
        m = m_t[:, None] & (o_d < COUNT)
        b_re = tl.load(p_row + (FIRST + o_d) * stride_d, mask=m, other=0.0)
        b_im = tl.load(p_row + (PAIRS + FIRST + o_d) * stride_d, mask=m, other=0.0)
    return b_re, b_im


@triton.jit
def store_pairs(
    p_row, stride_d, b_re, b_im, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_pairs`."""
    dtype: tl.constexpr = p_row.dtype.element_ty
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK)[None, :]
        b_x = tl.reshape(tl.join(b_re.to(dtype), b_im.to(dtype)), (m_t.shape[0], 2 * BLOCK))
        tl.store(p_row + (2 * FIRST + o_d) * stride_d, b_x, mask=m_t[:, None] & (o_d < 2 * COUNT))
    else:
        o_d = tl.arange(0, BLOCK)[None, :]
        m = m_t[:, None] & (o_d < COUNT)
        tl.store(p_row + (FIRST + o_d) * stride_d, b_re.to(dtype), mask=m)
        tl.store(p_row + (PAIRS + FIRST + o_d) * stride_d, b_im.to(dtype), mask=m)


@triton.jit
def rotate(b_re, b_im, b_cos, b_sin, shape):
    """RoPE: R x."""
    b_re, b_im = b_re.to(shape.COMPUTE), b_im.to(shape.COMPUTE)
    b_cos, b_sin = b_cos.to(shape.COMPUTE), b_sin.to(shape.COMPUTE)
    return b_re * b_cos - b_im * b_sin, b_im * b_cos + b_re * b_sin


@triton.jit
def rotate_back(b_re, b_im, b_cos, b_sin, shape):
    """R^T x, as backward has it."""
    b_re, b_im = b_re.to(shape.COMPUTE), b_im.to(shape.COMPUTE)
    b_cos, b_sin = b_cos.to(shape.COMPUTE), b_sin.to(shape.COMPUTE)
    return b_re * b_cos + b_im * b_sin, b_im * b_cos - b_re * b_sin


@triton.jit
def copy_rest(p_from, from_stride_d, p_to, to_stride_d, m_t, shape):
    """Partial rotary: the elements of the head beyond the pairs pass through."""
    if 2 * shape.PAIRS < shape.HEAD_DIM:
        o_d = tl.arange(0, shape.BLOCK_REST)[None, :]
        m = m_t[:, None] & (o_d < shape.HEAD_DIM - 2 * shape.PAIRS)
        b_x = tl.load(p_from + (2 * shape.PAIRS + o_d) * from_stride_d, mask=m)
        tl.store(p_to + (2 * shape.PAIRS + o_d) * to_stride_d, b_x, mask=m)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), as the square of a reciprocal root: 5 instructions, where `tl.sigmoid`'s division makes 12."""
    b_root = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
    return b_root * b_root
