"""Triton functions that RoAd's kernels share: the weights of pairs from angles and scales, a block of pairs turned by
them, and the sums that the gradients of angles and scales are made of.

Names in the kernels as in `heads.py`, and: p pair, s sequence, a adapter; _1 and _2 the elements of a pair; `b_w` the
four vectors of Eq. 4 of a block of pairs, `[1, BLOCK]` each: first_1, first_2, second_1, second_2.
"""

import triton
import triton.language as tl

from rosa_kernels.heads import Tokens

# pi / 2 in three parts, the first two short: a whole number times them is exact.
_HALF_PI_1 = tl.constexpr(1.5703125)
_HALF_PI_2 = tl.constexpr(0.0004837512969970703)
_HALF_PI_3 = tl.constexpr(7.549789948768648e-08)


@triton.jit
def split_tokens(i_t, splits, steps, BLOCK_T: tl.constexpr):
    """Which sequence a program is at, one of `splits` there, and the first of its tokens, `steps` blocks of them."""
    return i_t // splits, (i_t % splits) * steps * BLOCK_T


@triton.jit
def block_of_tokens(i_s, i_first, span, seq, cos_rows, BLOCK_T: tl.constexpr):
    """The BLOCK_T tokens from token i_first of sequence i_s on."""
    o = i_first + tl.arange(0, BLOCK_T)
    o_t = i_s * span + o
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    return Tokens(o_t.to(tl.int64), o < span, i_b, i_l, (o_t % cos_rows).to(tl.int64))


@triton.jit
def adapter_of(index, i_s, INDEXED: tl.constexpr):
    """The adapter of a sequence, a row of the tables."""
    if INDEXED:
        return tl.load(index + i_s).to(tl.int64)
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def cos_sin(b_x):
    """Cosine and sine, in float32 to 1e-7 for angles up to a million.

    Not tl.cos and tl.sin there: for huge angles these keep a table in local memory (eight of each a thread compile to
    80 accesses to it).
    """
    if b_x.dtype == tl.float64:
        b_cos, b_sin = tl.cos(b_x), tl.sin(b_x)
    else:
        b_quarters = tl.floor(b_x * 0.6366197723675814 + 0.5)  # turns by pi / 2
        b_r = tl.fma(-b_quarters, _HALF_PI_1, b_x)
        b_r = tl.fma(-b_quarters, _HALF_PI_2, b_r)
        b_r = tl.fma(-b_quarters, _HALF_PI_3, b_r)
        b_z = b_r * b_r  # from here on polynomials of least error up to pi / 4
        b_s = b_r + b_r * b_z * (-0.16666655 + b_z * (0.00833217 + b_z * -0.00019517))
        b_c = 1 - 0.5 * b_z + b_z * b_z * (0.0416666467 + b_z * (-0.00138873614 + b_z * 2.44377296e-05))
        i_quarter = b_quarters.to(tl.int32)
        odd = (i_quarter & 1) == 1
        b_cos, b_sin = tl.where(odd, b_s, b_c), tl.where(odd, b_c, b_s)
        b_cos = tl.where(((i_quarter + 1) & 2) == 2, -b_cos, b_cos)
        b_sin = tl.where((i_quarter & 2) == 2, -b_sin, b_sin)
    return b_cos, b_sin


@triton.jit
def load_weights(
    theta, alpha, o_p, o_1, o_2, m, WIDTH: tl.constexpr, VARIANT: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """`b_w` of pairs o_p of one adapter, which are columns o_1 and o_2 of the output, `[1, BLOCK]` each (Eq. 4)."""
    if VARIANT == 1:
        b_first_1, b_second_1 = _polar(theta, alpha, o_p, m, COMPUTE)
        b_first_2, b_second_2 = b_first_1, b_second_1
    else:
        b_first_1, b_second_1 = _polar(theta, alpha, o_1, m, COMPUTE)
        b_first_2, b_second_2 = _polar(theta, alpha, o_2, m, COMPUTE)
    if VARIANT == 4:  # the sine terms have angles and scales of their own, behind those of the cosine terms
        _, b_second_1 = _polar(theta, alpha, WIDTH + o_1, m, COMPUTE)
        _, b_second_2 = _polar(theta, alpha, WIDTH + o_2, m, COMPUTE)
    return b_first_1, b_first_2, b_second_1, b_second_2


@triton.jit
def _polar(theta, alpha, o, m, COMPUTE: tl.constexpr):
    b_cos, b_sin = cos_sin(tl.load(theta + o, mask=m, other=0.0).to(COMPUTE))
    b_alpha = tl.load(alpha + o, mask=m, other=0.0).to(COMPUTE)
    return b_alpha * b_cos, b_alpha * b_sin


@triton.jit
def turn(b_1, b_2, b_w):
    """Eq. 3, of pairs."""
    return b_w[0] * b_1 - b_w[2] * b_2, b_w[1] * b_2 + b_w[3] * b_1


@triton.jit
def turn_back(b_1, b_2, b_w):
    """The transpose of `turn`: from the gradient of its result to that of its input."""
    return b_w[0] * b_1 + b_w[3] * b_2, b_w[1] * b_2 - b_w[2] * b_1


@triton.jit
def no_sums(BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, VARIANT: tl.constexpr, COMPUTE: tl.constexpr):
    """What `add_products` adds to: two sums a pair for variant 1, four for the others."""
    b_zero = tl.zeros((BLOCK_T, BLOCK), COMPUTE)
    if VARIANT == 1:
        return b_zero, b_zero
    else:
        return b_zero, b_zero, b_zero, b_zero


@triton.jit
def add_products(b_sums, b_d1, b_d2, b_1, b_2, VARIANT: tl.constexpr):
    """The products of gradients with what was kept, added to the sums of a block's tokens.

    Variant 1 kept z: sum(g1 z1 + g2 z2) = a * da, and sum(g2 z1 - g1 z2) = dt. The others kept h: the gradients of
    first_1, first_2, second_1 and second_2.
    """
    if VARIANT == 1:
        return b_sums[0] + (b_d1 * b_1 + b_d2 * b_2), b_sums[1] + (b_d2 * b_1 - b_d1 * b_2)
    else:
        return b_sums[0] + b_d1 * b_1, b_sums[1] + b_d2 * b_2, b_sums[2] - b_d1 * b_2, b_sums[3] + b_d2 * b_1


@triton.jit
def store_sums(sums, b_sums, o_p, o_1, o_2, m, COLUMNS: tl.constexpr, VARIANT: tl.constexpr):
    """Stores a block's sums in a row of sums, `[2, COLUMNS]`: by pair for variant 1, by column for the others."""
    if VARIANT == 1:
        _store_sum(sums + o_p, b_sums[0], m)
        _store_sum(sums + COLUMNS + o_p, b_sums[1], m)
    else:
        _store_sum(sums + o_1, b_sums[0], m)
        _store_sum(sums + o_2, b_sums[1], m)
        _store_sum(sums + COLUMNS + o_1, b_sums[2], m)
        _store_sum(sums + COLUMNS + o_2, b_sums[3], m)


@triton.jit
def _store_sum(p, b_sum, m):
    tl.store(p, tl.sum(b_sum, axis=0)[None, :], mask=m)
