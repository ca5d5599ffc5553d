"""Triton functions on one head of a block of tokens: the RoPE and Eq. 4 that every kernel here shares.

Notable:
- The pairs of a head are taken in two tiles, `[BLOCK_T, BLOCK_HIGH]` of high frequency, which only rotate, and
  `[BLOCK_T, BLOCK_LOW]` of low frequency, which are enhanced; real and imaginary parts apart.
- For the signal's gradient, forward keeps a compact copy of the low-frequency pairs as they came in (exact in any
  dtype, a quarter of q and k at r_low = 0.25), and backward rotates it again.

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
    cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """cos and sin of pairs FIRST to FIRST + COUNT for every token of the block, `[BLOCK_T, BLOCK]` each."""
    o_pair = tl.arange(0, BLOCK)[None, :]
    m = m_t[:, None] & (o_pair < COUNT)
    o_row = o_row.to(tl.int64)[:, None]
    b_cos = tl.load(cos + o_row * cos_stride_row + (FIRST + o_pair) * cos_stride_d, mask=m, other=0.0)
    b_sin = tl.load(sin + o_row * sin_stride_row + (FIRST + o_pair) * sin_stride_d, mask=m, other=0.0)
    return b_cos.to(COMPUTE), b_sin.to(COMPUTE)


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
def load_low(p_row, m_t, LOW_PAIRS: tl.constexpr, BLOCK_LOW: tl.constexpr, COMPUTE: tl.constexpr):
    """The d_low numbers of a head of a signal, n real parts and n imaginary ones, `[BLOCK_T, BLOCK_LOW]` each."""
    return load_pairs(p_row, 1, m_t, 0, LOW_PAIRS, BLOCK_LOW, LOW_PAIRS, False, COMPUTE)


@triton.jit
def store_low(p_row, b_re, b_im, m_t, LOW_PAIRS: tl.constexpr, BLOCK_LOW: tl.constexpr):
    """The inverse of `load_low`."""
    store_pairs(p_row, 1, b_re, b_im, m_t, 0, LOW_PAIRS, BLOCK_LOW, LOW_PAIRS, False)


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


@triton.jit
def forward_head(
    p_in, p_out, p_low, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t, in_stride_d, out_stride_d,
    STORE_LOW: tl.constexpr, ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: RoPE, then Eq. 4 on the low-frequency pairs as Z* = Z * (1 + alpha * S)."""
    HIGH: tl.constexpr = PAIRS - LOW_PAIRS
    if HIGH > 0:
        b_re, b_im = load_pairs(p_in, in_stride_d, m_t, 0, HIGH, BLOCK_HIGH, PAIRS, INTERLEAVED, COMPUTE)
        b_z_re = b_re * b_cos - b_im * b_sin
        b_z_im = b_im * b_cos + b_re * b_sin
        store_pairs(p_out, out_stride_d, b_z_re, b_z_im, m_t, 0, HIGH, BLOCK_HIGH, PAIRS, INTERLEAVED)
    b_re, b_im = load_pairs(p_in, in_stride_d, m_t, HIGH, LOW_PAIRS, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE)
    b_z_re = (b_re * b_low_cos - b_im * b_low_sin) * (1 + ALPHA * b_s_re)
    b_z_im = (b_im * b_low_cos + b_re * b_low_sin) * (1 + ALPHA * b_s_im)
    store_pairs(p_out, out_stride_d, b_z_re, b_z_im, m_t, HIGH, LOW_PAIRS, BLOCK_LOW, PAIRS, INTERLEAVED)
    copy_rest(p_in, in_stride_d, p_out, out_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)
    if STORE_LOW:
        store_low(p_low, b_re, b_im, m_t, LOW_PAIRS, BLOCK_LOW)


@triton.jit
def backward_head(
    p_dout, p_dx, b_dy_re, b_dy_im, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t, dout_stride_d, dx_stride_d,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: dX = R^T (g * dY) with g = 1 + alpha * S; dY of the low-frequency pairs comes loaded."""
    HIGH: tl.constexpr = PAIRS - LOW_PAIRS
    if HIGH > 0:
        b_re, b_im = load_pairs(p_dout, dout_stride_d, m_t, 0, HIGH, BLOCK_HIGH, PAIRS, INTERLEAVED, COMPUTE)
        b_dx_re = b_re * b_cos + b_im * b_sin
        b_dx_im = b_im * b_cos - b_re * b_sin
        store_pairs(p_dx, dx_stride_d, b_dx_re, b_dx_im, m_t, 0, HIGH, BLOCK_HIGH, PAIRS, INTERLEAVED)
    b_dz_re = b_dy_re * (1 + ALPHA * b_s_re)
    b_dz_im = b_dy_im * (1 + ALPHA * b_s_im)
    b_dx_re = b_dz_re * b_low_cos + b_dz_im * b_low_sin
    b_dx_im = b_dz_im * b_low_cos - b_dz_re * b_low_sin
    store_pairs(p_dx, dx_stride_d, b_dx_re, b_dx_im, m_t, HIGH, LOW_PAIRS, BLOCK_LOW, PAIRS, INTERLEAVED)
    copy_rest(p_dout, dout_stride_d, p_dx, dx_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)


@triton.jit
def signal_gradient(
    p_low, b_dy_re, b_dy_im, b_low_cos, b_low_sin, m_t,
    ALPHA: tl.constexpr, LOW_PAIRS: tl.constexpr, BLOCK_LOW: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: dS = alpha * dY * Z, with Z the rotated low-frequency pairs."""
    b_re, b_im = load_low(p_low, m_t, LOW_PAIRS, BLOCK_LOW, COMPUTE)
    b_ds_re = ALPHA * b_dy_re * (b_re * b_low_cos - b_im * b_low_sin)
    b_ds_im = ALPHA * b_dy_im * (b_im * b_low_cos + b_re * b_low_sin)
    return b_ds_re, b_ds_im


@triton.jit
def silu_gradient(b_u):
    """S = SiLU(U) and its derivative with respect to U."""
    b_sigmoid = tl.sigmoid(b_u)
    b_s = b_u * b_sigmoid
    return b_s, b_sigmoid + b_s * (1 - b_sigmoid)
