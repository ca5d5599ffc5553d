"""RoAd of a linear layer's output, and its gradients: one launch forward, two backward (the second reduces).

Notable:
- A program does a block of pairs for some blocks of tokens, one after the other. It makes the vectors of Eq. 4 once,
  from angles and scales, in registers: so they cost no launch and are never written.
- Neighbours are loaded as one wide tile and split in registers. Pairs in halves of groups are two tiles; these are wide
  where half a group is a multiple of 16 bytes, and narrow in smaller groups.
- With an index, a block of tokens belongs to one sequence, whose adapter it reads on the device.
- The gradients of angles and scales are sums over tokens. A program adds them up in registers and stores one row of
  partial sums; the second launch adds the rows, always in the same order, and applies the chain rule.
"""

import triton
import triton.language as tl

from rosa_kernels.heads import head_rows
from rosa_kernels.road_tiles import (
    adapter_of,
    add_products,
    block_of_tokens,
    cos_sin,
    load_weights,
    no_sums,
    split_tokens,
    store_sums,
    turn,
    turn_back,
)


@triton.jit
def _columns(o_p, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The columns of the two elements of pairs o_p: j and j + GROUP / 2 in the first group of each HEAD_DIM columns,
    neighbours in the rest of them."""
    o_head, o = o_p // (HEAD_DIM // 2) * HEAD_DIM, o_p % (HEAD_DIM // 2)
    if GROUP == HEAD_DIM:  # apart, for wide accesses: a choice between two columns hides that they are side by side
        o_1, o_2 = o_head + o, o_head + o + GROUP // 2
    else:
        grouped = o < GROUP // 2
        o_1 = o_head + tl.where(grouped, o, 2 * o)
        o_2 = o_1 + tl.where(grouped, GROUP // 2, 1)
    return o_1, o_2


@triton.jit
def _load(p_row, stride_d, i_p, m_t, WIDTH: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
          BLOCK_P: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """Both elements of the BLOCK_P pairs from pair i_p on, `[BLOCK_T, BLOCK_P]` each."""
    if GROUP == 2:
        o = 2 * i_p + tl.arange(0, 2 * BLOCK_P)[None, :]
        b_x = tl.load(p_row + o * stride_d, mask=m_t[:, None] & (o < WIDTH), other=0.0)
        b_1, b_2 = tl.split(tl.reshape(b_x, (m_t.shape[0], BLOCK_P, 2)))
    else:
        o_p = i_p + tl.arange(0, BLOCK_P)[None, :]
        o_1, o_2 = _columns(o_p, GROUP, HEAD_DIM)
        m = m_t[:, None] & (o_p < WIDTH // 2)
        b_1 = tl.load(p_row + o_1 * stride_d, mask=m, other=0.0)
        b_2 = tl.load(p_row + o_2 * stride_d, mask=m, other=0.0)
    return b_1.to(COMPUTE), b_2.to(COMPUTE)


@triton.jit
def _store(p_row, stride_d, b_1, b_2, i_p, m_t, WIDTH: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
           BLOCK_P: tl.constexpr):  # fmt: skip
    """The inverse of `_load`."""
    dtype: tl.constexpr = p_row.dtype.element_ty
    if GROUP == 2:
        o = 2 * i_p + tl.arange(0, 2 * BLOCK_P)[None, :]
        b_x = tl.reshape(tl.join(b_1.to(dtype), b_2.to(dtype)), (m_t.shape[0], 2 * BLOCK_P))
        tl.store(p_row + o * stride_d, b_x, mask=m_t[:, None] & (o < WIDTH))
    else:
        o_p = i_p + tl.arange(0, BLOCK_P)[None, :]
        o_1, o_2 = _columns(o_p, GROUP, HEAD_DIM)
        m = m_t[:, None] & (o_p < WIDTH // 2)
        tl.store(p_row + o_1 * stride_d, b_1.to(dtype), mask=m)
        tl.store(p_row + o_2 * stride_d, b_2.to(dtype), mask=m)


@triton.jit(do_not_specialize=["tokens", "seq", "splits", "steps"])
def road_forward_kernel(
    x, theta, alpha, index, out, tokens, seq, splits, steps,
    VARIANT: tl.constexpr, INDEXED: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    NUMBERS: tl.constexpr = WIDTH * VARIANT // 2  # of an adapter
    COLUMN_BLOCKS: tl.constexpr = (WIDTH // 2 + BLOCK_P - 1) // BLOCK_P
    i_p = (tl.program_id(0) % COLUMN_BLOCKS) * BLOCK_P
    span = seq if INDEXED else tokens
    i_s, i_first = split_tokens(tl.program_id(0) // COLUMN_BLOCKS, splits, steps, BLOCK_T)
    i_a = adapter_of(index, i_s, INDEXED)
    o_p = i_p + tl.arange(0, BLOCK_P)[None, :]
    o_1, o_2 = _columns(o_p, GROUP, HEAD_DIM)
    b_w = load_weights(
        theta + i_a * NUMBERS, alpha + i_a * NUMBERS, o_p, o_1, o_2, o_p < WIDTH // 2, WIDTH, VARIANT, COMPUTE
    )
    for j in range(steps):
        t = block_of_tokens(i_s, i_first + j * BLOCK_T, span, seq, 1, BLOCK_T)
        p_x = head_rows(x, 0, t)
        p_out = head_rows(out, 0, t)
        b_1, b_2 = _load(p_x, x.d, i_p, t.m, WIDTH, GROUP, HEAD_DIM, BLOCK_P, COMPUTE)
        b_1, b_2 = turn(b_1, b_2, b_w)
        _store(p_out, out.d, b_1, b_2, i_p, t.m, WIDTH, GROUP, HEAD_DIM, BLOCK_P)


@triton.jit(do_not_specialize=["tokens", "seq", "splits", "steps"])
def road_backward_kernel(
    dout, kept, theta, alpha, index, dx, sums, tokens, seq, splits, steps,
    VARIANT: tl.constexpr, INDEXED: tl.constexpr, NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx, and a row of sums for each program's tokens. `kept` is forward's output for variant 1, else its input."""
    NUMBERS: tl.constexpr = WIDTH * VARIANT // 2  # of an adapter
    COLUMN_BLOCKS: tl.constexpr = (WIDTH // 2 + BLOCK_P - 1) // BLOCK_P
    COLUMNS: tl.constexpr = WIDTH // 2 if VARIANT == 1 else WIDTH  # of the sums
    i_p = (tl.program_id(0) % COLUMN_BLOCKS) * BLOCK_P
    i_t = tl.program_id(0) // COLUMN_BLOCKS
    span = seq if INDEXED else tokens
    i_s, i_first = split_tokens(i_t, splits, steps, BLOCK_T)
    i_a = adapter_of(index, i_s, INDEXED)
    o_p = i_p + tl.arange(0, BLOCK_P)[None, :]
    o_1, o_2 = _columns(o_p, GROUP, HEAD_DIM)
    if NEED_DX:
        b_w = load_weights(
            theta + i_a * NUMBERS, alpha + i_a * NUMBERS, o_p, o_1, o_2, o_p < WIDTH // 2, WIDTH, VARIANT, COMPUTE
        )
    b_sums = no_sums(BLOCK_T, BLOCK_P, VARIANT, COMPUTE)
    for j in range(steps):
        t = block_of_tokens(i_s, i_first + j * BLOCK_T, span, seq, 1, BLOCK_T)
        p_dout = head_rows(dout, 0, t)
        b_d1, b_d2 = _load(p_dout, dout.d, i_p, t.m, WIDTH, GROUP, HEAD_DIM, BLOCK_P, COMPUTE)
        if NEED_SUMS:
            p_kept = head_rows(kept, 0, t)
            b_1, b_2 = _load(p_kept, kept.d, i_p, t.m, WIDTH, GROUP, HEAD_DIM, BLOCK_P, COMPUTE)
            b_sums = add_products(b_sums, b_d1, b_d2, b_1, b_2, VARIANT)
        if NEED_DX:
            p_dx = head_rows(dx, 0, t)
            b_d1, b_d2 = turn_back(b_d1, b_d2, b_w)
            _store(p_dx, dx.d, b_d1, b_d2, i_p, t.m, WIDTH, GROUP, HEAD_DIM, BLOCK_P)
    if NEED_SUMS:
        p_sums = sums + i_t.to(tl.int64) * (2 * COLUMNS)
        store_sums(p_sums, b_sums, o_p, o_1, o_2, o_p < WIDTH // 2, COLUMNS, VARIANT)


@triton.jit
def _reduce(
    sums, index, theta, alpha, dtheta, dalpha, i_a, i_column, rows, sequences,
    VARIANT: tl.constexpr, INDEXED: tl.constexpr, NEED_DTHETA: tl.constexpr, NEED_DALPHA: tl.constexpr,
    COLUMNS: tl.constexpr, ALL_COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one adapter's angles and scales in a block of columns, from all rows of its sequences."""
    dtype: tl.constexpr = sums.dtype.element_ty
    o = i_column + tl.arange(0, BLOCK)
    m = o < COLUMNS
    b_first, b_second = tl.zeros((BLOCK_R, BLOCK), dtype), tl.zeros((BLOCK_R, BLOCK), dtype)
    for i_row in range(0, rows, BLOCK_R):
        o_row = i_row + tl.arange(0, BLOCK_R)
        m_row = o_row < rows
        if INDEXED:
            m_row &= tl.load(index + o_row // (rows // sequences), mask=m_row, other=-1) == i_a
        p_sums = sums + (o_row.to(tl.int64) * (2 * ALL_COLUMNS))[:, None] + o[None, :]
        b_first += tl.load(p_sums, mask=m_row[:, None] & m[None, :], other=0.0)
        b_second += tl.load(p_sums + ALL_COLUMNS, mask=m_row[:, None] & m[None, :], other=0.0)
    b_first, b_second = tl.sum(b_first, axis=0), tl.sum(b_second, axis=0)

    NUMBERS: tl.constexpr = 2 * COLUMNS if VARIANT == 4 else COLUMNS
    o += i_a.to(tl.int64) * NUMBERS
    b_alpha = tl.load(alpha + o, mask=m, other=1.0).to(dtype)
    if VARIANT == 1:  # the sums are a * da and dt
        b_dalpha = tl.where(b_alpha == 0, 0.0, b_first / tl.where(b_alpha == 0, 1.0, b_alpha))
        b_dtheta = b_second
    else:  # the sums are the gradients of first = a cos t and second = a sin t
        b_cos, b_sin = cos_sin(tl.load(theta + o, mask=m, other=0.0).to(dtype))
        b_dalpha, b_dtheta = b_first * b_cos, -b_first * b_alpha * b_sin
        if VARIANT == 4:
            b_alpha = tl.load(alpha + COLUMNS + o, mask=m, other=1.0).to(dtype)
            b_cos, b_sin = cos_sin(tl.load(theta + COLUMNS + o, mask=m, other=0.0).to(dtype))
            _store_gradient(dalpha + COLUMNS + o, b_second * b_sin, m, NEED_DALPHA)
            _store_gradient(dtheta + COLUMNS + o, b_second * b_alpha * b_cos, m, NEED_DTHETA)
        else:
            b_dalpha, b_dtheta = b_dalpha + b_second * b_sin, b_dtheta + b_second * b_alpha * b_cos
    _store_gradient(dalpha + o, b_dalpha, m, NEED_DALPHA)
    _store_gradient(dtheta + o, b_dtheta, m, NEED_DTHETA)


@triton.jit
def _store_gradient(p, b_x, m, NEED: tl.constexpr):
    if NEED:
        tl.store(p, b_x.to(p.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows", "sequences"])
def road_reduce_kernel(
    sums, index, theta, alpha, dtheta, dalpha, key_theta, key_alpha, dkey_theta, dkey_alpha, rows, sequences,
    VARIANT: tl.constexpr, INDEXED: tl.constexpr,
    NEED_DTHETA: tl.constexpr, NEED_DALPHA: tl.constexpr, NEED_DKEY_THETA: tl.constexpr, NEED_DKEY_ALPHA: tl.constexpr,
    COLUMNS: tl.constexpr, KEY_COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of sums holds the columns of one adapted output, or those of queries and then those of keys."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    KEY_BLOCKS: tl.constexpr = (KEY_COLUMNS + BLOCK - 1) // BLOCK
    ALL_COLUMNS: tl.constexpr = COLUMNS + KEY_COLUMNS
    i_a, i_block = tl.program_id(0) // (BLOCKS + KEY_BLOCKS), tl.program_id(0) % (BLOCKS + KEY_BLOCKS)
    if i_block < BLOCKS:
        _reduce(
            sums, index, theta, alpha, dtheta, dalpha, i_a, i_block * BLOCK, rows, sequences,
            VARIANT, INDEXED, NEED_DTHETA, NEED_DALPHA, COLUMNS, ALL_COLUMNS, BLOCK_R, BLOCK,
        )  # fmt: skip
    else:
        _reduce(
            sums + COLUMNS, index, key_theta, key_alpha, dkey_theta, dkey_alpha, i_a, (i_block - BLOCKS) * BLOCK,
            rows, sequences,
            VARIANT, INDEXED, NEED_DKEY_THETA, NEED_DKEY_ALPHA, KEY_COLUMNS, ALL_COLUMNS, BLOCK_R, BLOCK,
        )  # fmt: skip
