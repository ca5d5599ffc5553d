"""The kernels of RoPE and Eq. 4 of queries and keys, their signals given: one launch forward and one backward.

Notable:
- A program rotates a block of tokens for a few heads; heads are numbered through, queries first, then keys, so that one
  launch serves both. cos and sin are loaded once a program.
- A tile is `[BLOCK_T, BLOCK_PAIRS]`: all pairs of a head, real and imaginary parts apart. The gain g = 1 + alpha * S is
  loaded for the low-frequency columns only and is 1 elsewhere.
- Every stride of q, k and their gradients is an argument: no copies of what a model hands over.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from rosa_kernels.heads import (
    copy_rest,
    head_rows,
    load_pairs,
    load_rotary,
    rotate,
    rotate_back,
    sigmoid,
    store_pairs,
    token_block,
)


class Shape(NamedTuple):
    """What a binary is made for."""

    HEADS: Any
    KEY_HEADS: Any
    HEAD_DIM: Any
    PAIRS: Any
    LOW_PAIRS: Any
    INTERLEAVED: Any
    ROTARY_STEP: Any
    HEADS_PER_PROGRAM: Any
    BLOCK_T: Any
    BLOCK_PAIRS: Any
    BLOCK_REST: Any
    COMPUTE: Any


@triton.jit
def _signal_rows(signal, stride_t, i_head, t, shape):
    """Pointers to a head's d_low numbers of every token."""
    return signal + (t.o * stride_t + i_head * (2 * shape.LOW_PAIRS))[:, None]


@triton.jit
def _low_pairs(p_row, m_t, shape):
    """Where a tile's last LOW_PAIRS columns stand in a row of d_low numbers: real parts, then imaginary parts."""
    o = tl.arange(0, shape.BLOCK_PAIRS)[None, :] - (shape.PAIRS - shape.LOW_PAIRS)
    return p_row + o, p_row + (o + shape.LOW_PAIRS), m_t[:, None] & (o >= 0) & (o < shape.LOW_PAIRS)


@triton.jit
def _load_low(p_row, m_t, shape):
    p_re, p_im, m = _low_pairs(p_row, m_t, shape)
    return tl.load(p_re, mask=m, other=0.0).to(shape.COMPUTE), tl.load(p_im, mask=m, other=0.0).to(shape.COMPUTE)


@triton.jit
def _store_low(p_row, b_re, b_im, m_t, shape):
    p_re, p_im, m = _low_pairs(p_row, m_t, shape)
    tl.store(p_re, b_re.to(p_row.dtype.element_ty), mask=m)
    tl.store(p_im, b_im.to(p_row.dtype.element_ty), mask=m)


@triton.jit
def _load(x, i_head, t, shape):
    p_row = head_rows(x, i_head, t)
    return load_pairs(p_row, x.d, t.m, 0, shape.PAIRS, shape.BLOCK_PAIRS, shape.PAIRS, shape.INTERLEAVED)


@triton.jit
def _store(x, b_re, b_im, i_head, t, shape):
    p_row = head_rows(x, i_head, t)
    store_pairs(p_row, x.d, b_re, b_im, t.m, 0, shape.PAIRS, shape.BLOCK_PAIRS, shape.PAIRS, shape.INTERLEAVED)


@triton.jit
def _forward_head(
    x, x_out, i_head, p_signal, p_low, b_cos, b_sin, alpha, t, ACTIVATE: tl.constexpr, STORE_LOW: tl.constexpr, shape
):
    """One head of the block: RoPE, then Eq. 4 as Z* = Z * g with g = 1 + alpha * S (1 where S has no column)."""
    b_re, b_im = _load(x, i_head, t, shape)
    b_s_re, b_s_im = _load_low(p_signal, t.m, shape)
    if ACTIVATE:
        b_s_re *= sigmoid(b_s_re)
        b_s_im *= sigmoid(b_s_im)
    b_z_re, b_z_im = rotate(b_re, b_im, b_cos, b_sin, shape)
    _store(x_out, b_z_re * (1 + alpha * b_s_re), b_z_im * (1 + alpha * b_s_im), i_head, t, shape)
    copy_rest(head_rows(x, i_head, t), x.d, head_rows(x_out, i_head, t), x_out.d, t.m, shape)
    if STORE_LOW:
        _store_low(p_low, b_re, b_im, t.m, shape)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows"])
def rope_roae_forward_kernel(
    q, k, q_out, k_out, rotary, signal, key_signal, low, signal_stride_t, key_signal_stride_t, alpha: tl.float64,
    tokens, seq, cos_rows, SHARED: tl.constexpr, STORE_LOW: tl.constexpr, shape,
):  # fmt: skip
    ALL_HEADS: tl.constexpr = shape.HEADS + shape.KEY_HEADS
    GROUPS: tl.constexpr = (ALL_HEADS + shape.HEADS_PER_PROGRAM - 1) // shape.HEADS_PER_PROGRAM
    alpha = tl.full((), alpha, shape.COMPUTE)
    t = token_block(tl.program_id(0) // GROUPS, tokens, seq, cos_rows, shape.BLOCK_T)
    b_cos, b_sin = load_rotary(rotary, t, 0, shape.PAIRS, shape.BLOCK_PAIRS, shape)
    for j in range(shape.HEADS_PER_PROGRAM):
        i = tl.program_id(0) % GROUPS * shape.HEADS_PER_PROGRAM + j
        p_low = _signal_rows(low, ALL_HEADS * 2 * shape.LOW_PAIRS, i, t, shape)
        if i < shape.HEADS:
            p_signal = _signal_rows(signal, signal_stride_t, i, t, shape)
            _forward_head(q, q_out, i, p_signal, p_low, b_cos, b_sin, alpha, t, True, STORE_LOW, shape)
        elif i < ALL_HEADS:
            i_k = i - shape.HEADS
            p_signal = _signal_rows(key_signal, key_signal_stride_t, i_k, t, shape)
            _forward_head(k, k_out, i_k, p_signal, p_low, b_cos, b_sin, alpha, t, SHARED, STORE_LOW, shape)


@triton.jit
def _backward_head(
    dy, dx, i_head, p_low, b_s_re, b_s_im, b_cos, b_sin, alpha, t, NEED_DX: tl.constexpr, NEED_DS: tl.constexpr, shape
):
    """One head of the block: stores dX = R^T (g * dY) and returns dS = alpha * dY * Z, as far as they are asked for."""
    b_dy_re, b_dy_im = _load(dy, i_head, t, shape)
    b_dy_re, b_dy_im = b_dy_re.to(shape.COMPUTE), b_dy_im.to(shape.COMPUTE)
    if NEED_DX:
        b_dz_re, b_dz_im = b_dy_re * (1 + alpha * b_s_re), b_dy_im * (1 + alpha * b_s_im)
        b_dx_re, b_dx_im = rotate_back(b_dz_re, b_dz_im, b_cos, b_sin, shape)
        _store(dx, b_dx_re, b_dx_im, i_head, t, shape)
        copy_rest(head_rows(dy, i_head, t), dy.d, head_rows(dx, i_head, t), dx.d, t.m, shape)
    if NEED_DS:
        b_re, b_im = _load_low(p_low, t.m, shape)
        b_z_re, b_z_im = rotate(b_re, b_im, b_cos, b_sin, shape)
        b_ds_re, b_ds_im = alpha * b_dy_re * b_z_re, alpha * b_dy_im * b_z_im
    else:
        b_ds_re, b_ds_im = b_s_re, b_s_im  # unused
    return b_ds_re, b_ds_im


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows"])
def rope_roae_backward_kernel(
    dq_out, dk_out, dq, dk, rotary, signal, key_signal, low, dsignal, dkey_signal,
    signal_stride_t, key_signal_stride_t, alpha: tl.float64, tokens, seq, cos_rows,
    SHARED: tl.constexpr, NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DSIGNAL: tl.constexpr,
    NEED_DKEY_SIGNAL: tl.constexpr, shape,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * shape.LOW_PAIRS
    ALL_HEADS: tl.constexpr = shape.HEADS + shape.KEY_HEADS
    # With a shared signal a program does a query head and its key head, whose gradients of U add up in registers.
    UNITS: tl.constexpr = shape.HEADS if SHARED else ALL_HEADS
    GROUPS: tl.constexpr = (UNITS + shape.HEADS_PER_PROGRAM - 1) // shape.HEADS_PER_PROGRAM
    alpha = tl.full((), alpha, shape.COMPUTE)
    t = token_block(tl.program_id(0) // GROUPS, tokens, seq, cos_rows, shape.BLOCK_T)
    b_cos, b_sin = load_rotary(rotary, t, 0, shape.PAIRS, shape.BLOCK_PAIRS, shape)
    for j in range(shape.HEADS_PER_PROGRAM):
        i = tl.program_id(0) % GROUPS * shape.HEADS_PER_PROGRAM + j
        p_low = _signal_rows(low, ALL_HEADS * D_LOW, i, t, shape)
        if i < shape.HEADS:
            b_u_re, b_u_im = _load_low(_signal_rows(signal, signal_stride_t, i, t, shape), t.m, shape)
            b_sig_re, b_sig_im = sigmoid(b_u_re), sigmoid(b_u_im)
            b_s_re, b_s_im = b_u_re * b_sig_re, b_u_im * b_sig_im
            b_ds_re, b_ds_im = _backward_head(
                dq_out, dq, i, p_low, b_s_re, b_s_im, b_cos, b_sin, alpha, t, NEED_DQ, NEED_DSIGNAL, shape
            )
            if SHARED:
                p_low_k = p_low + shape.HEADS * D_LOW
                b_dks_re, b_dks_im = _backward_head(
                    dk_out, dk, i, p_low_k, b_s_re, b_s_im, b_cos, b_sin, alpha, t, NEED_DK, NEED_DSIGNAL, shape
                )
                b_ds_re += b_dks_re
                b_ds_im += b_dks_im
            if NEED_DSIGNAL:  # dU = dS * SiLU'(U)
                b_du_re = b_ds_re * (b_sig_re + b_s_re * (1 - b_sig_re))
                b_du_im = b_ds_im * (b_sig_im + b_s_im * (1 - b_sig_im))
                _store_low(_signal_rows(dsignal, shape.HEADS * D_LOW, i, t, shape), b_du_re, b_du_im, t.m, shape)
        elif i < UNITS:
            i_k = i - shape.HEADS
            b_s_re, b_s_im = _load_low(_signal_rows(key_signal, key_signal_stride_t, i_k, t, shape), t.m, shape)
            b_ds_re, b_ds_im = _backward_head(
                dk_out, dk, i_k, p_low, b_s_re, b_s_im, b_cos, b_sin, alpha, t, NEED_DK, NEED_DKEY_SIGNAL, shape
            )
            if NEED_DKEY_SIGNAL:
                p_ds = _signal_rows(dkey_signal, shape.KEY_HEADS * D_LOW, i_k, t, shape)
                _store_low(p_ds, b_ds_re, b_ds_im, t.m, shape)
