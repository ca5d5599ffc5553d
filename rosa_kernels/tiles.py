"""Triton functions that load and store one head of a block of tokens, for every rotary layout.

Names in the kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values;
t token, l position in the sequence, b batch, h head, d element of a head.
"""

import triton
import triton.language as tl


@triton.jit
def row_pointers(x, i_b, i_l, i_h, stride_b, stride_h, stride_l):
    """Pointers to the first element of head i_h for every token of the block, `[BLOCK_T, 1]`, in 64 bits."""
    return x + (i_b * stride_b + i_l * stride_l + tl.cast(i_h, tl.int64) * stride_h)[:, None]


@triton.jit
def load_rotary(
    cos, sin, o_row, m_t, cos_stride_row, sin_stride_row,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, ROTARY_STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """cos and sin of pairs FIRST to FIRST + COUNT for every token of the block, `[BLOCK_T, BLOCK]` each."""
    o_row = o_row.to(tl.int64)[:, None]
    b_cos = _load_rotary(cos + o_row * cos_stride_row, m_t, FIRST, COUNT, BLOCK, ROTARY_STEP)
    b_sin = _load_rotary(sin + o_row * sin_stride_row, m_t, FIRST, COUNT, BLOCK, ROTARY_STEP)
    return b_cos.to(COMPUTE), b_sin.to(COMPUTE)


@triton.jit
def _load_rotary(p_row, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, ROTARY_STEP: tl.constexpr):
    if ROTARY_STEP == 2:  # every value stands twice: a wide load, half of it dropped
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
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, COMPUTE: tl.constexpr,
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
    return b_re.to(COMPUTE), b_im.to(COMPUTE)


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
def copy_rest(
    p_from, from_stride_d, p_to, to_stride_d, m_t, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_REST: tl.constexpr
):
    """Partial rotary: the elements of the head beyond the pairs pass through."""
    if 2 * PAIRS < HEAD_DIM:
        o_d = tl.arange(0, BLOCK_REST)[None, :]
        m = m_t[:, None] & (o_d < HEAD_DIM - 2 * PAIRS)
        b_x = tl.load(p_from + (2 * PAIRS + o_d) * from_stride_d, mask=m)
        tl.store(p_to + (2 * PAIRS + o_d) * to_stride_d, b_x, mask=m)
