"""RoPE and Eq. 4 of queries and keys, their signals given, as one Triton launch forward and one backward.

Notable:
- A program rotates a block of tokens for a few heads; heads are numbered through, queries first, then keys, so that one
  launch serves both. cos and sin are loaded once a program.
- A tile is `[BLOCK_T, BLOCK_PAIRS]`: all pairs of a head, real and imaginary parts apart. The gain g = 1 + alpha * S is
  loaded for the low-frequency columns only and is 1 elsewhere.
- Every stride of q, k and their gradients is an argument: no copies of what a model hands over.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.checks import low_size
from rosa_kernels.launch import (
    Launch,
    cdiv,
    empty_heads,
    head_arguments,
    next_power_of_2,
    refuse_double_backward,
    register,
    shape_arguments,
)
from rosa_kernels.tiles import copy_rest, load_pairs, load_rotary, row_pointers, store_pairs

NUM_WARPS = 4
TILE_BYTES = 32 * NUM_WARPS * 16  # one 128-bit access a thread
MAX_BLOCK_T = 64  # of tiny heads: a thread keeps 64-bit offsets for its tokens
HEADS_PER_PROGRAM = 4


@triton.jit
def _low_pairs(p_row, m_t, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """Where a tile's last LOW_PAIRS columns stand in a row of d_low numbers: real parts, then imaginary parts."""
    o_low = tl.arange(0, BLOCK_PAIRS)[None, :] - (PAIRS - LOW_PAIRS)
    m_low = m_t[:, None] & (o_low >= 0) & (o_low < LOW_PAIRS)
    return p_row + o_low, p_row + (o_low + LOW_PAIRS), m_low


@triton.jit
def _load_low(
    p_row, m_t, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, COMPUTE: tl.constexpr
):
    p_re, p_im, m_low = _low_pairs(p_row, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS)
    return tl.load(p_re, mask=m_low, other=0.0).to(COMPUTE), tl.load(p_im, mask=m_low, other=0.0).to(COMPUTE)


@triton.jit
def _store_low(p_row, b_re, b_im, m_t, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    p_re, p_im, m_low = _low_pairs(p_row, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS)
    tl.store(p_re, b_re.to(p_row.dtype.element_ty), mask=m_low)
    tl.store(p_im, b_im.to(p_row.dtype.element_ty), mask=m_low)


@triton.jit
def _forward_head(
    p_in, p_out, p_signal, p_low, b_cos, b_sin, m_t, in_stride_d, out_stride_d,
    ACTIVATE: tl.constexpr, STORE_LOW: tl.constexpr, ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: RoPE, then Eq. 4 as Z* = Z * g with g = 1 + alpha * S (1 where S has no column)."""
    b_re, b_im = load_pairs(p_in, in_stride_d, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED, COMPUTE)
    b_s_re, b_s_im = _load_low(p_signal, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS, COMPUTE)
    if ACTIVATE:
        b_s_re *= tl.sigmoid(b_s_re)
        b_s_im *= tl.sigmoid(b_s_im)
    b_z_re = (b_re * b_cos - b_im * b_sin) * (1 + ALPHA * b_s_re)
    b_z_im = (b_im * b_cos + b_re * b_sin) * (1 + ALPHA * b_s_im)
    store_pairs(p_out, out_stride_d, b_z_re, b_z_im, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED)
    copy_rest(p_in, in_stride_d, p_out, out_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)
    if STORE_LOW:
        _store_low(p_low, b_re, b_im, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows"])
def rope_roae_forward_kernel(
    q, k, cos, sin, signal, key_signal, q_out, k_out, low,
    tokens, seq, cos_rows,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    q_out_stride_b, q_out_stride_h, q_out_stride_l, q_out_stride_d,
    k_out_stride_b, k_out_stride_h, k_out_stride_l, k_out_stride_d,
    cos_stride_row, sin_stride_row, signal_stride_t, key_signal_stride_t,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr, SHARED: tl.constexpr,
    STORE_LOW: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = (HEADS + KEY_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    i_group = tl.program_id(0) % GROUPS
    o_t = (tl.program_id(0) // GROUPS) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    b_cos, b_sin = load_rotary(
        cos, sin, o_t % cos_rows, m_t, cos_stride_row, sin_stride_row,
        0, PAIRS, BLOCK_PAIRS, ROTARY_STEP, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    for j in range(HEADS_PER_PROGRAM):
        i = i_group * HEADS_PER_PROGRAM + j
        p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW) + i * D_LOW)[:, None]
        if i < HEADS:
            _forward_head(
                row_pointers(q, i_b, i_l, i, q_stride_b, q_stride_h, q_stride_l),
                row_pointers(q_out, i_b, i_l, i, q_out_stride_b, q_out_stride_h, q_out_stride_l),
                signal + (o_t * signal_stride_t + i * D_LOW)[:, None],
                p_low, b_cos, b_sin, m_t, q_stride_d, q_out_stride_d,
                True, STORE_LOW, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
            )  # fmt: skip
        elif i < HEADS + KEY_HEADS:
            i_k = i - HEADS
            _forward_head(
                row_pointers(k, i_b, i_l, i_k, k_stride_b, k_stride_h, k_stride_l),
                row_pointers(k_out, i_b, i_l, i_k, k_out_stride_b, k_out_stride_h, k_out_stride_l),
                key_signal + (o_t * key_signal_stride_t + i_k * D_LOW)[:, None],
                p_low, b_cos, b_sin, m_t, k_stride_d, k_out_stride_d,
                SHARED, STORE_LOW, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
            )  # fmt: skip


@triton.jit
def _backward_head(
    p_dout, p_dx, p_low, b_s_re, b_s_im, b_cos, b_sin, m_t, dout_stride_d, dx_stride_d,
    NEED_DX: tl.constexpr, NEED_DS: tl.constexpr, ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: stores dX = R^T (g * dY) and returns dS = alpha * dY * Z, as far as they are asked for."""
    b_dy_re, b_dy_im = load_pairs(p_dout, dout_stride_d, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED, COMPUTE)
    if NEED_DX:
        b_dz_re = b_dy_re * (1 + ALPHA * b_s_re)
        b_dz_im = b_dy_im * (1 + ALPHA * b_s_im)
        b_dx_re = b_dz_re * b_cos + b_dz_im * b_sin
        b_dx_im = b_dz_im * b_cos - b_dz_re * b_sin
        store_pairs(p_dx, dx_stride_d, b_dx_re, b_dx_im, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED)
        copy_rest(p_dout, dout_stride_d, p_dx, dx_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)
    if NEED_DS:
        b_re, b_im = _load_low(p_low, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS, COMPUTE)
        b_ds_re = ALPHA * b_dy_re * (b_re * b_cos - b_im * b_sin)
        b_ds_im = ALPHA * b_dy_im * (b_im * b_cos + b_re * b_sin)
    else:
        b_ds_re, b_ds_im = b_s_re, b_s_im  # unused
    return b_ds_re, b_ds_im


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows"])
def rope_roae_backward_kernel(
    dq_out, dk_out, cos, sin, signal, key_signal, low, dq, dk, dsignal, dkey_signal,
    tokens, seq, cos_rows,
    dq_out_stride_b, dq_out_stride_h, dq_out_stride_l, dq_out_stride_d,
    dk_out_stride_b, dk_out_stride_h, dk_out_stride_l, dk_out_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_l, dq_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d,
    cos_stride_row, sin_stride_row, signal_stride_t, key_signal_stride_t,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr, SHARED: tl.constexpr,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_DSIGNAL: tl.constexpr, NEED_DKEY_SIGNAL: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    # With a shared signal a program does a query head and its key head, whose gradients of U add up in registers.
    UNITS: tl.constexpr = HEADS if SHARED else HEADS + KEY_HEADS
    GROUPS: tl.constexpr = (UNITS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    i_group = tl.program_id(0) % GROUPS
    o_t = (tl.program_id(0) // GROUPS) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    b_cos, b_sin = load_rotary(
        cos, sin, o_t % cos_rows, m_t, cos_stride_row, sin_stride_row,
        0, PAIRS, BLOCK_PAIRS, ROTARY_STEP, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW))[:, None]
    for j in range(HEADS_PER_PROGRAM):
        i = i_group * HEADS_PER_PROGRAM + j
        if i < HEADS:
            p_u = signal + (o_t * signal_stride_t + i * D_LOW)[:, None]
            b_u_re, b_u_im = _load_low(p_u, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS, COMPUTE)
            b_sig_re, b_sig_im = tl.sigmoid(b_u_re), tl.sigmoid(b_u_im)
            b_s_re, b_s_im = b_u_re * b_sig_re, b_u_im * b_sig_im
            b_ds_re, b_ds_im = _backward_head(
                row_pointers(dq_out, i_b, i_l, i, dq_out_stride_b, dq_out_stride_h, dq_out_stride_l),
                row_pointers(dq, i_b, i_l, i, dq_stride_b, dq_stride_h, dq_stride_l),
                p_low + i * D_LOW, b_s_re, b_s_im, b_cos, b_sin, m_t, dq_out_stride_d, dq_stride_d,
                NEED_DQ, NEED_DSIGNAL, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
            )  # fmt: skip
            if SHARED:
                b_dks_re, b_dks_im = _backward_head(
                    row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l),
                    row_pointers(dk, i_b, i_l, i, dk_stride_b, dk_stride_h, dk_stride_l),
                    p_low + (HEADS + i) * D_LOW, b_s_re, b_s_im, b_cos, b_sin, m_t, dk_out_stride_d, dk_stride_d,
                    NEED_DK, NEED_DSIGNAL, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS,
                    BLOCK_PAIRS, BLOCK_REST, COMPUTE,
                )  # fmt: skip
                b_ds_re += b_dks_re
                b_ds_im += b_dks_im
            if NEED_DSIGNAL:  # dU = dS * SiLU'(U)
                b_du_re = b_ds_re * (b_sig_re + b_s_re * (1 - b_sig_re))
                b_du_im = b_ds_im * (b_sig_im + b_s_im * (1 - b_sig_im))
                p_du = dsignal + (o_t * (HEADS * D_LOW) + i * D_LOW)[:, None]
                _store_low(p_du, b_du_re, b_du_im, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS)
        elif i < UNITS:
            i_k = i - HEADS
            p_s = key_signal + (o_t * key_signal_stride_t + i_k * D_LOW)[:, None]
            b_s_re, b_s_im = _load_low(p_s, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS, COMPUTE)
            b_ds_re, b_ds_im = _backward_head(
                row_pointers(dk_out, i_b, i_l, i_k, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l),
                row_pointers(dk, i_b, i_l, i_k, dk_stride_b, dk_stride_h, dk_stride_l),
                p_low + i * D_LOW, b_s_re, b_s_im, b_cos, b_sin, m_t, dk_out_stride_d, dk_stride_d,
                NEED_DK, NEED_DKEY_SIGNAL, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS,
                BLOCK_PAIRS, BLOCK_REST, COMPUTE,
            )  # fmt: skip
            if NEED_DKEY_SIGNAL:
                p_ds = dkey_signal + (o_t * (KEY_HEADS * D_LOW) + i_k * D_LOW)[:, None]
                _store_low(p_ds, b_ds_re, b_ds_im, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS)


def forward_launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, signal: Tensor, key_signal: Tensor | None,
    alpha: float, interleaved: bool, store_low: bool,
) -> Launch:  # fmt: skip
    """The forward launch; its outputs are q_out, k_out and the compact low-frequency pairs `[tokens, heads * d_low]`.

    cos and sin come with one column a pair, `[1 or b, l, R / 2]`; the other arguments as `rope_roae` has them.
    Without `store_low` the last output is empty.
    """
    units = q.shape[1] + k.shape[1]
    shape = _arguments(q, k, cos, sin, signal, key_signal, alpha, interleaved, units)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    low = q.new_empty(shape["tokens"], units * 2 * shape["LOW_PAIRS"] if store_low else 0)
    arguments = shape | head_arguments(q=q, k=k, q_out=q_out, k_out=k_out) | dict(low=low, STORE_LOW=store_low)
    return Launch(rope_roae_forward_kernel, _programs(shape, units), NUM_WARPS, arguments, outputs=(q_out, k_out, low))


def backward_launch(
    dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, signal: Tensor, key_signal: Tensor | None, low: Tensor,
    alpha: float, interleaved: bool, sequence_major: bool, needs: list[bool],
) -> Launch:  # fmt: skip
    """The backward launch; its outputs are dq, dk, dsignal and dkey_signal.

    `needs` says for each of the four whether it is asked for: the others come back empty. `sequence_major` lays dq and
    dk out as `[b, l, h, d]`, as Hugging Face's projections have it, so that their own backward needs no copy.
    """
    need_dq, need_dk, need_dsignal, need_dkey_signal = needs
    shared = key_signal is None
    units = dq_out.shape[1] + (0 if shared else dk_out.shape[1])
    shape = _arguments(dq_out, dk_out, cos, sin, signal, key_signal, alpha, interleaved, units)
    dq = empty_heads(dq_out, sequence_major) if need_dq else dq_out.new_empty(0)
    dk = empty_heads(dk_out, sequence_major) if need_dk else dk_out.new_empty(0)
    dsignal = signal.new_empty(signal.shape if need_dsignal else 0)
    dkey_signal = (signal if shared else key_signal).new_empty(key_signal.shape if need_dkey_signal else 0)
    arguments = shape | head_arguments(dq_out=dq_out, dk_out=dk_out, dq=dq, dk=dk)
    arguments |= dict(
        low=low, dsignal=dsignal, dkey_signal=dkey_signal,
        NEED_DQ=need_dq, NEED_DK=need_dk, NEED_DSIGNAL=need_dsignal, NEED_DKEY_SIGNAL=need_dkey_signal,
    )  # fmt: skip
    outputs = (dq, dk, dsignal, dkey_signal)
    return Launch(rope_roae_backward_kernel, _programs(shape, units), NUM_WARPS, arguments, outputs)


def _arguments(q, k, cos, sin, signal, key_signal, alpha: float, interleaved: bool, units: int) -> dict[str, Any]:
    """The arguments that both kernels share; q and k may be gradients of the outputs."""
    signal = _signal_rows(signal)
    shared = key_signal is None
    key_signal = signal if shared else _signal_rows(key_signal)
    d_low = low_size(q.shape[1], signal, k.shape[1], key_signal)
    shape = shape_arguments(q, k, cos, sin) | dict(LOW_PAIRS=d_low // 2)
    block_pairs = next_power_of_2(shape["PAIRS"])
    widest = max(block_pairs, shape["BLOCK_REST"])
    return shape | dict(
        signal=signal, key_signal=key_signal,
        signal_stride_t=signal.stride(0), key_signal_stride_t=key_signal.stride(0),
        ALPHA=alpha, INTERLEAVED=interleaved, SHARED=shared, HEADS_PER_PROGRAM=min(HEADS_PER_PROGRAM, units),
        BLOCK_T=min(max(1, TILE_BYTES // q.element_size() // widest), MAX_BLOCK_T), BLOCK_PAIRS=block_pairs,
    )  # fmt: skip


def _programs(shape: dict[str, Any], units: int) -> int:
    return cdiv(shape["tokens"], shape["BLOCK_T"]) * cdiv(units, shape["HEADS_PER_PROGRAM"])


def _signal_rows(t: Tensor) -> Tensor:
    """`[batch * seq, width]` with columns side by side, as the kernels read a signal; a projection's output needs no
    copy for that. The stride of a single row is set anew, to that of dense rows."""
    t = t.flatten(0, 1)
    return t if t.stride(1) == 1 else t.contiguous()


register(
    "rope_roae_forward",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor signal, Tensor? key_signal, "
    "float alpha, bool interleaved, bool store_low) -> (Tensor, Tensor, Tensor)",
    forward_launch,
)
register(
    "rope_roae_backward",
    "(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, Tensor signal, Tensor? key_signal, Tensor low, "
    "float alpha, bool interleaved, bool sequence_major, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_launch,
)


class _RopeRoae(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, signal, key_signal, alpha, interleaved):
        needs_q, needs_k, _, _, needs_signal, needs_key_signal, *_ = ctx.needs_input_grad
        arguments = (q, k, cos, sin, signal, key_signal, alpha, interleaved, needs_signal or needs_key_signal)
        q_out, k_out, low = torch.ops.rosa.rope_roae_forward(*arguments)
        ctx.save_for_backward(cos, sin, signal, key_signal, low)
        ctx.needs = [needs_q, needs_k, needs_signal, needs_key_signal]
        ctx.sequence_major = q.stride(1) <= q.stride(2)
        ctx.alpha, ctx.interleaved = alpha, interleaved
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        refuse_double_backward("rope_roae")
        arguments = (dq_out, dk_out, *ctx.saved_tensors, ctx.alpha, ctx.interleaved, ctx.sequence_major, ctx.needs)
        grads = torch.ops.rosa.rope_roae_backward(*arguments)
        dq, dk, dsignal, dkey_signal = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
        return dq, dk, None, None, dsignal, dkey_signal, None, None


def rope_roae_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, signal: Tensor, key_signal: Tensor | None,
    alpha: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rosa_kernels.rope_roae` on the Triton backend, its arguments checked, cos and sin with one column a pair."""
    if torch.is_grad_enabled():
        return _RopeRoae.apply(q, k, cos, sin, signal, key_signal, alpha, interleaved)
    return torch.ops.rosa.rope_roae_forward(q, k, cos, sin, signal, key_signal, alpha, interleaved, False)[:2]
