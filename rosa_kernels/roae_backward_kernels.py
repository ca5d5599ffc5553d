"""RoAE's backward kernels: the keys of grouped-query attention, then all else.

With g = 1 + alpha * S on the low-frequency pairs and dY the gradient of the output: dX = R^T (g * dY),
dS = alpha * dY * Z, dU = dS * SiLU'(U); of grouped keys dS goes back through Eq. 3 to that of the queries.

Notable:
- U is computed again, and what the weights' gradients, GEMMs all, are made of is written.
- The keys of grouped-query attention come first, in a launch of their own: every query head needs the gradient of
  Eq. 3's latent. One launch in which each program makes it again would take a third more registers or half the tokens.
- The high tile is loaded behind the two products, and ahead of all else: 128 registers, of which four programs of four
  warps find room on a multiprocessor, and two waits for memory a head. Loaded ahead of the products it is one wait, at
  165 registers and three programs.
"""

import triton
import triton.language as tl

from rosa_kernels.heads import copy_rest, head_rows, rotate, rotate_back, sigmoid, token_block
from rosa_kernels.roae_tiles import (
    load_head_columns,
    load_head_rows,
    load_high_tile,
    load_low,
    load_low_rotary,
    load_low_tile,
    load_rows,
    packed,
    product,
    store_high_tile,
    store_low,
    store_low_of_product,
    store_low_tile,
    store_rows,
)


@triton.jit
def _silu_and_slope(b_u):
    """S = SiLU(U) and its derivative with respect to U."""
    b_sigmoid = sigmoid(b_u)
    b_s = b_u * b_sigmoid
    return b_s, b_sigmoid + b_s * (1 - b_sigmoid)


@triton.jit
def _signal_gradient(p_low, dy_low, low_rotary, alpha, t, shape):
    """One head of the block: dS = alpha * dY * Z, with Z the rotated low-frequency pairs; as pairs."""
    b_re, b_im = load_low(p_low, t.m, shape)
    b_z_re, b_z_im = rotate(b_re, b_im, low_rotary[0], low_rotary[1], shape)
    return alpha * tl.join(dy_low[0].to(shape.COMPUTE) * b_z_re, dy_low[1].to(shape.COMPUTE) * b_z_im)


@triton.jit
def _backward_head(high, dy_low, b_s, low_rotary, dy, dx, i_head, alpha, t, shape):
    """One head of the block: dX = R^T (g * dY) with g = 1 + alpha * S."""
    p_dx = head_rows(dx, i_head, t)
    if shape.SPLIT > 0:
        b_re, b_im = rotate_back(high[0], high[1], high[2], high[3], shape)
        store_high_tile(p_dx, dx.d, b_re, b_im, t.m, shape)
    b_dz_re, b_dz_im = tl.split(tl.join(dy_low[0], dy_low[1]).to(shape.COMPUTE) * (1 + alpha * b_s))
    b_re, b_im = rotate_back(b_dz_re, b_dz_im, low_rotary[0], low_rotary[1], shape)
    store_low_tile(p_dx, dx.d, b_re, b_im, t.m, shape)
    copy_rest(head_rows(dy, i_head, t), dy.d, p_dx, dx.d, t.m, shape)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows"])
def roae_backward_keys_kernel(
    dk_out, dk, rotary, gqa_up, low, key_latent, dkey_signal, dkey_latent, alpha: tl.float64,
    tokens, seq, cos_rows,
    NEED_DX: tl.constexpr, NEED_DU: tl.constexpr, NEED_DGQA: tl.constexpr, shape,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * shape.LOW_PAIRS
    alpha = tl.full((), alpha, shape.COMPUTE)
    t = token_block(tl.program_id(0), tokens, seq, cos_rows, shape.BLOCK_T)
    low_rotary = load_low_rotary(rotary, t, shape)
    p_low = low + (t.o * ((shape.HEADS + shape.KEY_HEADS) * D_LOW) + shape.HEADS * D_LOW)[:, None]
    b_key_latent = load_rows(key_latent, t.o, t.m, shape.RANK, shape.BLOCK_R).to(shape.DOT)
    b_dkey_latent = tl.zeros((shape.BLOCK_T, shape.BLOCK_R), shape.COMPUTE)
    for i in range(shape.KEY_HEADS):
        p_dy = head_rows(dk_out, i, t)
        b_w = load_head_rows(gqa_up, i, shape)
        b_s = product(b_key_latent, tl.trans(b_w), shape)
        high = load_high_tile(p_dy, dk_out.d, rotary, t, shape)
        dy_low = load_low_tile(p_dy, dk_out.d, t.m, shape)
        if NEED_DU:
            b_ds = _signal_gradient(p_low + i * D_LOW, dy_low, low_rotary, alpha, t, shape)
            b_dkey_latent = tl.dot(
                packed(b_ds.to(shape.DOT), shape), b_w, b_dkey_latent, input_precision="ieee", out_dtype=shape.COMPUTE
            )
            if NEED_DGQA:
                p_ds = dkey_signal + (t.o * (shape.KEY_HEADS * D_LOW) + i * D_LOW)[:, None]
                b_ds_re, b_ds_im = tl.split(b_ds)
                store_low(p_ds, b_ds_re, b_ds_im, t.m, shape)
        if NEED_DX:
            _backward_head(high, dy_low, b_s, low_rotary, dk_out, dk, i, alpha, t, shape)
    if NEED_DU:
        store_rows(dkey_latent, t.o, t.m, b_dkey_latent, shape.RANK, shape.BLOCK_R)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows", "heads_per_program"])
def roae_backward_kernel(
    dq_out, dk_out, dq, dk, rotary, latent, up, gqa_down, low, dkey_latent, du, signal, alpha: tl.float64,
    tokens, seq, cos_rows, heads_per_program,
    GROUPED: tl.constexpr, NEED_DX: tl.constexpr, NEED_DU: tl.constexpr, NEED_DGQA: tl.constexpr, shape,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * shape.LOW_PAIRS
    alpha = tl.full((), alpha, shape.COMPUTE)
    groups = tl.cdiv(shape.HEADS, heads_per_program)
    t = token_block(tl.program_id(0) // groups, tokens, seq, cos_rows, shape.BLOCK_T)
    low_rotary = load_low_rotary(rotary, t, shape)
    p_low = low + (t.o * ((shape.HEADS + shape.KEY_HEADS) * D_LOW))[:, None]
    b_latent = load_rows(latent, t.o, t.m, shape.RANK, shape.BLOCK_R).to(shape.DOT)
    if GROUPED and NEED_DU:
        b_dkey_latent = load_rows(dkey_latent, t.o, t.m, shape.RANK, shape.BLOCK_R).to(shape.DOT)
    first = tl.program_id(0) % groups * heads_per_program
    last = tl.minimum(first + heads_per_program, shape.HEADS)
    for i in tl.range(first, last, num_stages=shape.HEAD_STAGES):
        p_dy = head_rows(dq_out, i, t)
        b_w = load_head_rows(up, i, shape)
        if GROUPED and NEED_DU:
            b_gqa = load_head_columns(gqa_down, i, shape)
        b_u = product(b_latent, tl.trans(b_w), shape)
        if GROUPED and NEED_DU:
            b_dkeys = product(b_dkey_latent, b_gqa, shape)
        high = load_high_tile(p_dy, dq_out.d, rotary, t, shape)
        dy_low = load_low_tile(p_dy, dq_out.d, t.m, shape)
        b_s, b_slope = _silu_and_slope(b_u)
        if not GROUPED:
            p_dk = head_rows(dk_out, i, t)
            dk_low = load_low_tile(p_dk, dk_out.d, t.m, shape)
        if NEED_DU:  # dU = dS * SiLU'(U)
            b_ds = _signal_gradient(p_low + i * D_LOW, dy_low, low_rotary, alpha, t, shape)
            if GROUPED:
                b_ds += b_dkeys
            else:
                b_ds += _signal_gradient(p_low + (shape.HEADS + i) * D_LOW, dk_low, low_rotary, alpha, t, shape)
            o_s = (t.o * (shape.HEADS * D_LOW) + i * D_LOW)[:, None]
            b_du_re, b_du_im = tl.split(b_ds * b_slope)
            store_low(du + o_s, b_du_re, b_du_im, t.m, shape)
            if NEED_DGQA:
                store_low_of_product(signal + o_s, b_s, t.m, shape)
        if NEED_DX:
            _backward_head(high, dy_low, b_s, low_rotary, dq_out, dq, i, alpha, t, shape)
            if not GROUPED:
                high = load_high_tile(p_dk, dk_out.d, rotary, t, shape)
                _backward_head(high, dk_low, b_s, low_rotary, dk_out, dk, i, alpha, t, shape)
