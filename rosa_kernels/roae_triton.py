"""The whole of RoAE after its first GEMM: one Triton launch forward, two backward (keys, then the rest).

From the latent H W_down: U = latent W_up, S = SiLU(U) (Eq. 2), S_K = S W_GQA (Eq. 3), RoPE and Eq. 4 of q and k.

Notable:
- A program does a block of tokens for a few query heads or, with grouped-query attention, for all key heads: these need
  S of every query head, which their program computes again in wide columns rather than wait for the others.
- Forward saves the latent, the low-frequency pairs as they came in and Eq. 3's own latent, and no signal: backward
  computes U again, and writes what the weights' gradients, GEMMs all, are made of.
- Backward does the keys of grouped-query attention first, in a launch of their own: every query head needs the gradient
  of Eq. 3's latent. One launch in which each program makes it again compiled to 255 registers at 32 tokens, or to half
  the tokens at 166; apart they take 152 and 168.
- How many heads a program does depends on how many tokens there are, and is no constant of the kernel: one binary
  serves every batch and sequence, with few programs of much work and with many of little.
- cos and sin of the high-frequency pairs are read for every head, from cache: kept, they would cost 32 registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.launch import Launch, empty_heads, head_arguments, refuse_double_backward, register, shape_arguments
from rosa_kernels.tiles import (
    backward_head,
    forward_head,
    load_pairs,
    load_rotary,
    row_pointers,
    signal_gradient,
    silu_gradient,
    store_low,
)

NUM_WARPS = 4
TILE_BYTES = 32 * NUM_WARPS * 32  # two 128-bit accesses a thread
MAX_BLOCK_T = 32  # of small heads
PROGRAMS = 1024  # to aim at: some waves of what a large GPU holds at once
MIN_DOT = 16  # the smallest side of a tile that tl.dot takes
MAX_RANK = 256  # a latent is held whole
BLOCK_S = 32  # columns of S at a time, for Eq. 3


@triton.jit
def _load_rows(p, o_t, m_t, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows o_t of a dense matrix of COLUMNS, `[BLOCK_T, BLOCK]`."""
    o = tl.arange(0, BLOCK)[None, :]
    return tl.load(p + o_t[:, None] * COLUMNS + o, mask=m_t[:, None] & (o < COLUMNS), other=0.0)


@triton.jit
def _store_rows(p, o_t, m_t, b_x, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[None, :]
    tl.store(p + o_t[:, None] * COLUMNS + o, b_x.to(p.dtype.element_ty), mask=m_t[:, None] & (o < COLUMNS))


@triton.jit
def _load_head_rows(w, i_head, LOW_PAIRS: tl.constexpr, BLOCK_LOW: tl.constexpr, RANK: tl.constexpr,
                    BLOCK_R: tl.constexpr):  # fmt: skip
    """One head's rows of a weight `[heads * d_low, rank]`: of real and of imaginary parts, `[BLOCK_LOW, BLOCK_R]`."""
    o, o_r = tl.arange(0, BLOCK_LOW)[:, None], tl.arange(0, BLOCK_R)[None, :]
    m = (o < LOW_PAIRS) & (o_r < RANK)
    p = w + i_head * (2 * LOW_PAIRS * RANK)
    b_re = tl.load(p + (o * RANK + o_r), mask=m, other=0.0)
    b_im = tl.load(p + ((LOW_PAIRS + o) * RANK + o_r), mask=m, other=0.0)
    return b_re, b_im


@triton.jit
def _load_head_columns(w, i_head, HEADS: tl.constexpr, LOW_PAIRS: tl.constexpr, BLOCK_LOW: tl.constexpr,
                       RANK: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """One head's columns of a weight `[rank, heads * d_low]`: real and imaginary parts, `[BLOCK_R, BLOCK_LOW]`."""
    o_r, o = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_LOW)[None, :]
    m = (o_r < RANK) & (o < LOW_PAIRS)
    p = w + i_head * (2 * LOW_PAIRS)
    b_re = tl.load(p + (o_r * (2 * HEADS * LOW_PAIRS) + o), mask=m, other=0.0)
    b_im = tl.load(p + (o_r * (2 * HEADS * LOW_PAIRS) + LOW_PAIRS + o), mask=m, other=0.0)
    return b_re, b_im


@triton.jit
def _project(b_latent, w, i_head, LOW_PAIRS: tl.constexpr, BLOCK_LOW: tl.constexpr, RANK: tl.constexpr,
             BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """A latent `[BLOCK_T, BLOCK_R]` times one head's rows of a weight: real and imaginary, `[BLOCK_T, BLOCK_LOW]`."""
    b_w_re, b_w_im = _load_head_rows(w, i_head, LOW_PAIRS, BLOCK_LOW, RANK, BLOCK_R)
    b_re = tl.dot(b_latent, tl.trans(b_w_re), input_precision="ieee", out_dtype=COMPUTE)
    b_im = tl.dot(b_latent, tl.trans(b_w_im), input_precision="ieee", out_dtype=COMPUTE)
    return b_re, b_im


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows", "heads_per_program"])
def roae_forward_kernel(
    q, k, cos, sin, latent, up, gqa_down, gqa_up, q_out, k_out, low, key_latent,
    tokens, seq, cos_rows, heads_per_program,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    q_out_stride_b, q_out_stride_h, q_out_stride_l, q_out_stride_d,
    k_out_stride_b, k_out_stride_h, k_out_stride_l, k_out_stride_d,
    cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, GROUPED: tl.constexpr, STORE: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    DOT: tl.constexpr = latent.dtype.element_ty
    groups = tl.cdiv(HEADS, heads_per_program) + GROUPED
    i_group = tl.program_id(0) % groups - GROUPED  # -1: the keys of grouped-query attention, the longest work, first
    o_t = (tl.program_id(0) // groups) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    o_row = o_t % cos_rows
    b_low_cos, b_low_sin = load_rotary(
        cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
        PAIRS - LOW_PAIRS, LOW_PAIRS, BLOCK_LOW, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW))[:, None]
    b_latent = _load_rows(latent, o_t, m_t, RANK, BLOCK_R)

    if GROUPED and i_group < 0:
        S_COLUMNS: tl.constexpr = HEADS * D_LOW
        b_key_latent = tl.zeros((BLOCK_T, BLOCK_R), COMPUTE)
        for i_s in range(0, S_COLUMNS, BLOCK_S):
            o_s = i_s + tl.arange(0, BLOCK_S)
            o_r = tl.arange(0, BLOCK_R)
            m_s, m_r = o_s < S_COLUMNS, o_r < RANK
            b_up = tl.load(up + o_s[:, None] * RANK + o_r[None, :], mask=m_s[:, None] & m_r[None, :], other=0.0)
            b_u = tl.dot(b_latent, tl.trans(b_up), input_precision="ieee", out_dtype=COMPUTE)
            p_gqa = gqa_down + o_r[:, None] * S_COLUMNS + o_s[None, :]
            b_gqa = tl.load(p_gqa, mask=m_r[:, None] & m_s[None, :], other=0.0)
            b_s = (b_u * tl.sigmoid(b_u)).to(DOT)
            b_key_latent = tl.dot(b_s, tl.trans(b_gqa), b_key_latent, input_precision="ieee", out_dtype=COMPUTE)
        b_key_latent = b_key_latent.to(DOT)
        if STORE:
            _store_rows(key_latent, o_t, m_t, b_key_latent, RANK, BLOCK_R)
        for i_k in range(KEY_HEADS):
            b_s_re, b_s_im = _project(b_key_latent, gqa_up, i_k, LOW_PAIRS, BLOCK_LOW, RANK, BLOCK_R, COMPUTE)
            b_cos, b_sin = load_rotary(
                cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
                0, PAIRS - LOW_PAIRS, BLOCK_HIGH, COMPUTE,
            )  # fmt: skip
            forward_head(
                row_pointers(k, i_b, i_l, i_k, k_stride_b, k_stride_h, k_stride_l),
                row_pointers(k_out, i_b, i_l, i_k, k_out_stride_b, k_out_stride_h, k_out_stride_l),
                p_low + (HEADS + i_k) * D_LOW, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t,
                k_stride_d, k_out_stride_d,
                STORE, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST, COMPUTE,
            )  # fmt: skip
    for i in range(tl.maximum(i_group, 0) * heads_per_program, tl.minimum((i_group + 1) * heads_per_program, HEADS)):
        b_u_re, b_u_im = _project(b_latent, up, i, LOW_PAIRS, BLOCK_LOW, RANK, BLOCK_R, COMPUTE)
        b_s_re, b_s_im = b_u_re * tl.sigmoid(b_u_re), b_u_im * tl.sigmoid(b_u_im)
        b_cos, b_sin = load_rotary(
            cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
            0, PAIRS - LOW_PAIRS, BLOCK_HIGH, COMPUTE,
        )  # fmt: skip
        forward_head(
            row_pointers(q, i_b, i_l, i, q_stride_b, q_stride_h, q_stride_l),
            row_pointers(q_out, i_b, i_l, i, q_out_stride_b, q_out_stride_h, q_out_stride_l),
            p_low + i * D_LOW, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t, q_stride_d, q_out_stride_d,
            STORE, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST, COMPUTE,
        )  # fmt: skip
        if not GROUPED:
            b_cos, b_sin = load_rotary(
                cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
                0, PAIRS - LOW_PAIRS, BLOCK_HIGH, COMPUTE,
            )  # fmt: skip
            forward_head(
                row_pointers(k, i_b, i_l, i, k_stride_b, k_stride_h, k_stride_l),
                row_pointers(k_out, i_b, i_l, i, k_out_stride_b, k_out_stride_h, k_out_stride_l),
                p_low + (HEADS + i) * D_LOW, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t,
                k_stride_d, k_out_stride_d,
                STORE, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST, COMPUTE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows"])
def roae_backward_keys_kernel(
    dk_out, cos, sin, gqa_up, low, key_latent, dk, dkey_signal, dkey_latent,
    tokens, seq, cos_rows,
    dk_out_stride_b, dk_out_stride_h, dk_out_stride_l, dk_out_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d,
    cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DU: tl.constexpr, NEED_DGQA: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    DOT: tl.constexpr = key_latent.dtype.element_ty
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    o_row = o_t % cos_rows
    b_low_cos, b_low_sin = load_rotary(
        cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
        PAIRS - LOW_PAIRS, LOW_PAIRS, BLOCK_LOW, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    if NEED_DX:
        b_key_latent = _load_rows(key_latent, o_t, m_t, RANK, BLOCK_R)
        for i in range(KEY_HEADS):
            b_s_re, b_s_im = _project(b_key_latent, gqa_up, i, LOW_PAIRS, BLOCK_LOW, RANK, BLOCK_R, COMPUTE)
            p_dk_out = row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l)
            b_dk_re, b_dk_im = load_pairs(
                p_dk_out, dk_out_stride_d, m_t, PAIRS - LOW_PAIRS, LOW_PAIRS, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
            )
            b_cos, b_sin = load_rotary(
                cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
                0, PAIRS - LOW_PAIRS, BLOCK_HIGH, COMPUTE,
            )  # fmt: skip
            backward_head(
                p_dk_out, row_pointers(dk, i_b, i_l, i, dk_stride_b, dk_stride_h, dk_stride_l),
                b_dk_re, b_dk_im, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t, dk_out_stride_d, dk_stride_d,
                ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST, COMPUTE,
            )  # fmt: skip
    if NEED_DU:
        b_dkey_latent = tl.zeros((BLOCK_T, BLOCK_R), COMPUTE)
        for i in range(KEY_HEADS):
            p_dk_out = row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l)
            b_dk_re, b_dk_im = load_pairs(
                p_dk_out, dk_out_stride_d, m_t, PAIRS - LOW_PAIRS, LOW_PAIRS, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
            )
            p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW) + (HEADS + i) * D_LOW)[:, None]
            b_ds_re, b_ds_im = signal_gradient(
                p_low, b_dk_re, b_dk_im, b_low_cos, b_low_sin, m_t, ALPHA, LOW_PAIRS, BLOCK_LOW, COMPUTE
            )
            b_w_re, b_w_im = _load_head_rows(gqa_up, i, LOW_PAIRS, BLOCK_LOW, RANK, BLOCK_R)
            b_dkey_latent = tl.dot(b_ds_re.to(DOT), b_w_re, b_dkey_latent, input_precision="ieee", out_dtype=COMPUTE)
            b_dkey_latent = tl.dot(b_ds_im.to(DOT), b_w_im, b_dkey_latent, input_precision="ieee", out_dtype=COMPUTE)
            if NEED_DGQA:
                p_ds = dkey_signal + (o_t * (KEY_HEADS * D_LOW) + i * D_LOW)[:, None]
                store_low(p_ds, b_ds_re, b_ds_im, m_t, LOW_PAIRS, BLOCK_LOW)
        _store_rows(dkey_latent, o_t, m_t, b_dkey_latent, RANK, BLOCK_R)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows", "heads_per_program"])
def roae_backward_kernel(
    dq_out, dk_out, cos, sin, latent, up, gqa_down, low, dkey_latent, dq, dk, du, signal,
    tokens, seq, cos_rows, heads_per_program,
    dq_out_stride_b, dq_out_stride_h, dq_out_stride_l, dq_out_stride_d,
    dk_out_stride_b, dk_out_stride_h, dk_out_stride_l, dk_out_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_l, dq_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d,
    cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, GROUPED: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DU: tl.constexpr, NEED_DGQA: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    groups = tl.cdiv(HEADS, heads_per_program)
    i_group = tl.program_id(0) % groups
    o_t = (tl.program_id(0) // groups) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    o_row = o_t % cos_rows
    b_low_cos, b_low_sin = load_rotary(
        cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
        PAIRS - LOW_PAIRS, LOW_PAIRS, BLOCK_LOW, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW))[:, None]
    b_latent = _load_rows(latent, o_t, m_t, RANK, BLOCK_R)
    if GROUPED and NEED_DU:
        b_dkey_latent = _load_rows(dkey_latent, o_t, m_t, RANK, BLOCK_R)
    for i in range(i_group * heads_per_program, tl.minimum((i_group + 1) * heads_per_program, HEADS)):
        b_u_re, b_u_im = _project(b_latent, up, i, LOW_PAIRS, BLOCK_LOW, RANK, BLOCK_R, COMPUTE)
        b_s_re, b_slope_re = silu_gradient(b_u_re)
        b_s_im, b_slope_im = silu_gradient(b_u_im)
        p_dq_out = row_pointers(dq_out, i_b, i_l, i, dq_out_stride_b, dq_out_stride_h, dq_out_stride_l)
        b_dq_re, b_dq_im = load_pairs(
            p_dq_out, dq_out_stride_d, m_t, PAIRS - LOW_PAIRS, LOW_PAIRS, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
        )
        if not GROUPED:
            p_dk_out = row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l)
            b_dk_re, b_dk_im = load_pairs(
                p_dk_out, dk_out_stride_d, m_t, PAIRS - LOW_PAIRS, LOW_PAIRS, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
            )
        if NEED_DU:  # dU = dS * SiLU'(U)
            b_ds_re, b_ds_im = signal_gradient(
                p_low + i * D_LOW, b_dq_re, b_dq_im, b_low_cos, b_low_sin, m_t, ALPHA, LOW_PAIRS, BLOCK_LOW, COMPUTE
            )
            if GROUPED:
                b_w_re, b_w_im = _load_head_columns(gqa_down, i, HEADS, LOW_PAIRS, BLOCK_LOW, RANK, BLOCK_R)
                b_ds_re += tl.dot(b_dkey_latent, b_w_re, input_precision="ieee", out_dtype=COMPUTE)
                b_ds_im += tl.dot(b_dkey_latent, b_w_im, input_precision="ieee", out_dtype=COMPUTE)
            else:
                p_low_k = p_low + (HEADS + i) * D_LOW
                b_dks_re, b_dks_im = signal_gradient(
                    p_low_k, b_dk_re, b_dk_im, b_low_cos, b_low_sin, m_t, ALPHA, LOW_PAIRS, BLOCK_LOW, COMPUTE
                )
                b_ds_re += b_dks_re
                b_ds_im += b_dks_im
            o_s = (o_t * (HEADS * D_LOW) + i * D_LOW)[:, None]
            store_low(du + o_s, b_ds_re * b_slope_re, b_ds_im * b_slope_im, m_t, LOW_PAIRS, BLOCK_LOW)
            if NEED_DGQA:
                store_low(signal + o_s, b_s_re, b_s_im, m_t, LOW_PAIRS, BLOCK_LOW)
        if NEED_DX:
            b_cos, b_sin = load_rotary(
                cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
                0, PAIRS - LOW_PAIRS, BLOCK_HIGH, COMPUTE,
            )  # fmt: skip
            backward_head(
                p_dq_out, row_pointers(dq, i_b, i_l, i, dq_stride_b, dq_stride_h, dq_stride_l),
                b_dq_re, b_dq_im, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t, dq_out_stride_d, dq_stride_d,
                ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST, COMPUTE,
            )  # fmt: skip
            if not GROUPED:
                backward_head(
                    p_dk_out, row_pointers(dk, i_b, i_l, i, dk_stride_b, dk_stride_h, dk_stride_l),
                    b_dk_re, b_dk_im, b_s_re, b_s_im, b_cos, b_sin, b_low_cos, b_low_sin, m_t,
                    dk_out_stride_d, dk_stride_d,
                    ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST, COMPUTE,
                )  # fmt: skip


def forward_launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, latent: Tensor,
    up: Tensor, gqa_down: Tensor | None, gqa_up: Tensor | None, alpha: float, interleaved: bool, store: bool,
) -> Launch:  # fmt: skip
    """The forward launch. Its outputs are q_out, k_out, the compact low-frequency pairs `[tokens, heads * d_low]` and
    the latent of Eq. 3, S times W_GQA's first factor, `[tokens, rank]`: the last two empty without `store`.

    The latent H W_down is dense, `[tokens, rank]`; cos and sin come with one column a pair, `[1 or b, l, R / 2]`; the
    other arguments are as `roae` has them.
    """
    grouped = gqa_down is not None
    shape = _arguments(q, k, cos, sin, latent, up.shape[0], alpha, interleaved)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    tokens, heads = shape["tokens"], q.shape[1] + k.shape[1]
    low = q.new_empty(tokens, heads * 2 * shape["LOW_PAIRS"] if store else 0)
    key_latent = latent.new_empty(tokens, latent.shape[1] if store and grouped else 0)
    arguments = shape | head_arguments(q=q, k=k, q_out=q_out, k_out=k_out)
    arguments |= dict(
        latent=latent, up=up, gqa_down=gqa_down if grouped else up, gqa_up=gqa_up if grouped else up,
        low=low, key_latent=key_latent, GROUPED=grouped, STORE=store, BLOCK_S=BLOCK_S,
        heads_per_program=_heads_per_program(shape),
    )  # fmt: skip
    programs = _programs(arguments) + (triton.cdiv(tokens, shape["BLOCK_T"]) if grouped else 0)
    return Launch(roae_forward_kernel, programs, NUM_WARPS, arguments, (q_out, k_out, low, key_latent))


def backward_keys_launch(
    dk_out: Tensor, cos: Tensor, sin: Tensor, gqa_up: Tensor, low: Tensor, key_latent: Tensor, heads: int,
    alpha: float, interleaved: bool, sequence_major: bool, need_dx: bool, need_du: bool, need_dgqa: bool,
) -> Launch:  # fmt: skip
    """The first backward launch of grouped-query attention, over the keys alone.

    Its outputs are dk (with `need_dx`), the gradient of Eq. 3's latent `[tokens, rank]` (`need_du`) and dS_K
    `[tokens, key_heads * d_low]` (`need_dgqa`): what is not asked for is empty. `heads` counts the query heads.
    """
    shape = _arguments(dk_out, dk_out, cos, sin, key_latent, gqa_up.shape[0], alpha, interleaved)
    dk = empty_heads(dk_out, sequence_major) if need_dx else dk_out.new_empty(0)
    dkey_latent = key_latent.new_empty(shape["tokens"], key_latent.shape[1] if need_du else 0)
    dkey_signal = key_latent.new_empty(shape["tokens"], gqa_up.shape[0] if need_dgqa else 0)
    arguments = shape | head_arguments(dk_out=dk_out, dk=dk)
    arguments |= dict(
        gqa_up=gqa_up, low=low, key_latent=key_latent, dkey_signal=dkey_signal, dkey_latent=dkey_latent,
        HEADS=heads, NEED_DX=need_dx, NEED_DU=need_du, NEED_DGQA=need_dgqa,
    )  # fmt: skip
    arguments["BLOCK_T"] = MIN_DOT  # all heads in one program: small blocks, so that there are enough of them
    blocks = triton.cdiv(shape["tokens"], MIN_DOT)
    return Launch(roae_backward_keys_kernel, blocks, NUM_WARPS, arguments, (dk, dkey_latent, dkey_signal))


def backward_launch(
    dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, latent: Tensor, up: Tensor, gqa_down: Tensor | None,
    low: Tensor, dkey_latent: Tensor | None, alpha: float, interleaved: bool, sequence_major: bool,
    need_dx: bool, need_du: bool, need_dgqa: bool,
) -> Launch:  # fmt: skip
    """The backward launch over the queries, and over the keys where they share the queries' signal (no `gqa_down`).

    Its outputs are dq and dk (with `need_dx`; dk only of keys that share), dU `[tokens, heads * d_low]` (`need_du`) and
    S alike (`need_dgqa`): what is not asked for is empty. `sequence_major` lays dq and dk out as `[b, l, h, d]`, as
    Hugging Face's projections have it, so that their own backward needs no copy.
    """
    grouped = gqa_down is not None
    shape = _arguments(dq_out, dk_out, cos, sin, latent, up.shape[0], alpha, interleaved)
    dq = empty_heads(dq_out, sequence_major) if need_dx else dq_out.new_empty(0)
    dk = empty_heads(dk_out, sequence_major) if need_dx and not grouped else dk_out.new_empty(0)
    du = latent.new_empty(shape["tokens"], up.shape[0] if need_du else 0)
    signal = latent.new_empty(shape["tokens"], up.shape[0] if need_dgqa else 0)
    arguments = shape | head_arguments(dq_out=dq_out, dk_out=dq_out if grouped else dk_out, dq=dq, dk=dk)
    arguments |= dict(
        latent=latent, up=up, gqa_down=gqa_down if grouped else up, low=low,
        dkey_latent=dkey_latent if grouped else latent, du=du, signal=signal, GROUPED=grouped,
        NEED_DX=need_dx, NEED_DU=need_du, NEED_DGQA=need_dgqa, heads_per_program=_heads_per_program(shape),
    )  # fmt: skip
    return Launch(roae_backward_kernel, _programs(arguments), NUM_WARPS, arguments, (dq, dk, du, signal))


def _arguments(q, k, cos, sin, latent, columns: int, alpha: float, interleaved: bool) -> dict[str, Any]:
    """The arguments that all kernels share; q and k may be gradients of outputs; `columns` are those of q's signal."""
    shape = shape_arguments(q, k, cos, sin, low_pairs=columns // q.shape[1] // 2)
    block_low = max(MIN_DOT, shape["BLOCK_LOW"])
    widest = max(shape["BLOCK_HIGH"], block_low, shape["BLOCK_REST"])
    return shape | dict(
        ALPHA=alpha, INTERLEAVED=interleaved, RANK=latent.shape[1],
        BLOCK_T=min(max(MIN_DOT, TILE_BYTES // q.element_size() // widest), MAX_BLOCK_T),
        BLOCK_LOW=block_low, BLOCK_R=max(MIN_DOT, triton.next_power_of_2(latent.shape[1])),
    )  # fmt: skip


def _heads_per_program(shape: dict[str, Any]) -> int:
    """As many heads as leave some PROGRAMS programs, which with few tokens is one."""
    blocks = triton.cdiv(shape["tokens"], shape["BLOCK_T"])
    return min(max(1, blocks * shape["HEADS"] // PROGRAMS), shape["HEADS"])


def _programs(arguments: dict[str, Any]) -> int:
    groups = triton.cdiv(arguments["HEADS"], arguments["heads_per_program"])
    return triton.cdiv(arguments["tokens"], arguments["BLOCK_T"]) * groups


register(
    "roae_forward",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor latent, Tensor up, Tensor? gqa_down, Tensor? gqa_up, "
    "float alpha, bool interleaved, bool store) -> (Tensor, Tensor, Tensor, Tensor)",
    forward_launch,
)
register(
    "roae_backward_keys",
    "(Tensor dk_out, Tensor cos, Tensor sin, Tensor gqa_up, Tensor low, Tensor key_latent, int heads, float alpha, "
    "bool interleaved, bool sequence_major, bool need_dx, bool need_du, bool need_dgqa) -> (Tensor, Tensor, Tensor)",
    backward_keys_launch,
)
register(
    "roae_backward",
    "(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, Tensor latent, Tensor up, Tensor? gqa_down, Tensor low, "
    "Tensor? dkey_latent, float alpha, bool interleaved, bool sequence_major, bool need_dx, bool need_du, "
    "bool need_dgqa) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_launch,
)


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dY^T X, `[columns of dY, columns of X]`, in the weight's dtype.

    A float32 gradient of 16-bit activations comes out of the GEMM as it was summed: not rounded, with no cast kernel.
    """
    if dtype == dy.dtype:
        return _product(dy.T, x)
    if dy.is_cuda and dtype == torch.float32:
        return torch.mm(dy.T, x, out_dtype=dtype)
    return _product(dy.T.to(dtype), x.to(dtype))


# An operator, since torch.compile does not know `out_dtype` everywhere.
torch.library.define(
    "rosa::weight_gradient", "(Tensor dy, Tensor x, ScalarType dtype) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl("rosa::weight_gradient", "default", _weight_gradient)
torch.library.register_fake(
    "rosa::weight_gradient", lambda dy, x, dtype: dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
)


class _RoAE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, hidden_states, down, up, gqa_down, gqa_up, alpha, interleaved):
        latent, *weights = _project_down(hidden_states, down, up, gqa_down, gqa_up)
        q_out, k_out, low, key_latent = torch.ops.rosa.roae_forward(
            q, k, cos, sin, latent, *weights, alpha, interleaved, True
        )
        kept = hidden_states if ctx.needs_input_grad[5] else None  # only W_down's gradient asks for H
        ctx.save_for_backward(cos, sin, kept, down, latent, up, gqa_down, gqa_up, low, key_latent)
        ctx.sequence_major = q.stride(1) <= q.stride(2)
        ctx.alpha, ctx.interleaved, ctx.hidden_shape = alpha, interleaved, hidden_states.shape
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        refuse_double_backward("roae")
        cos, sin, hidden_states, *weights_and_saved = ctx.saved_tensors
        down, latent, up, gqa_down, gqa_up, low, key_latent = weights_and_saved
        needs_q, needs_k, _, _, needs_hidden, needs_down, needs_up, *needs_gqa = ctx.needs_input_grad[:9]
        need_dgqa = any(needs_gqa)
        needs = (needs_q or needs_k, needs_hidden or needs_down or needs_up or need_dgqa, need_dgqa)
        options = (ctx.alpha, ctx.interleaved, ctx.sequence_major, *needs)
        rounded = _rounded((down, up, gqa_down, gqa_up), latent.dtype)

        dkey_latent = None
        if gqa_down is not None:
            dk, dkey_latent, dkey_signal = torch.ops.rosa.roae_backward_keys(
                dk_out, cos, sin, rounded[3], low, key_latent, dq_out.shape[1], *options
            )
        dq, dk_shared, du, signal = torch.ops.rosa.roae_backward(
            dq_out, dk_out, cos, sin, latent, rounded[1], rounded[2], low, dkey_latent, *options
        )
        if gqa_down is None:
            dk = dk_shared
        grads = [dq if needs_q else None, dk if needs_k else None, *[None] * 9]
        if needs_hidden or needs_down:
            dlatent = _product(du, rounded[1])
        if needs_hidden:
            grads[4] = _product(dlatent, rounded[0]).view(ctx.hidden_shape)
        if needs_down:
            grads[5] = torch.ops.rosa.weight_gradient(dlatent, hidden_states.reshape(-1, down.shape[1]), down.dtype)
        if needs_up:
            grads[6] = torch.ops.rosa.weight_gradient(du, latent, up.dtype)
        if needs_gqa[0]:
            grads[7] = torch.ops.rosa.weight_gradient(dkey_latent, signal, gqa_down.dtype)
        if needs_gqa[1]:
            grads[8] = torch.ops.rosa.weight_gradient(dkey_signal, key_latent, gqa_up.dtype)
        return tuple(grads)


def _project_down(hidden_states: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """H W_down of Eq. 2, `[tokens, rank]`, and the three other weights, in H's dtype."""
    down, *others = _rounded(weights, hidden_states.dtype)
    return [_product(hidden_states.reshape(-1, hidden_states.shape[-1]), down.T), *others]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, whatever autocast prefers."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _rounded(weights: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The weights in `dtype`, dense: float32 ones under 16-bit activations are rounded by one launch for all."""
    others = [w for w in weights if w is not None and (w.dtype != dtype or not w.is_contiguous())]
    copies = [torch.empty_like(w, dtype=dtype, memory_format=torch.contiguous_format) for w in others]
    if copies:
        torch._foreach_copy_(copies, others)
    copies = iter(copies)
    return [next(copies) if any(w is other for other in others) else w for w in weights]


def roae_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, hidden_states: Tensor,
    down: Tensor, up: Tensor, gqa_down: Tensor | None, gqa_up: Tensor | None, alpha: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rosa_kernels.roae` on the Triton backend, its arguments checked, H in q's dtype, cos and sin with one column a
    pair, the rank at most MAX_RANK."""
    weights = (down, up, gqa_down, gqa_up)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, hidden_states, *weights)):
        return _RoAE.apply(q, k, cos, sin, hidden_states, *weights, alpha, interleaved)
    latent, *weights = _project_down(hidden_states, *weights)
    return torch.ops.rosa.roae_forward(q, k, cos, sin, latent, *weights, alpha, interleaved, False)[:2]
