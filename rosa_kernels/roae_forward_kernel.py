"""RoAE's forward kernel: all that comes after the first GEMM, H W_down, in one launch.

From the latent H W_down: U = latent W_up, S = SiLU(U) (Eq. 2), S_K = S W_GQA (Eq. 3), RoPE and Eq. 4 of q and k.

Notable:
- A program does a block of tokens for a few query heads or, with grouped-query attention, for all key heads: these need
  S of every query head, which is computed again in wide columns rather than waited for.
- With few tokens Eq. 3 would be the launch's longest work: several programs share its columns, and the last of them to
  arrive adds their parts up, in order, and does the key heads.
- How many heads a program does, and how many programs share Eq. 3, depends on how many tokens there are, and is no
  constant of the kernel: one binary serves every batch and sequence.
- Loads stand before the product whose barriers would hold them back; those of the low tile stand after it, as its
  layout follows what was loaded last, and cost four barriers a head before it.
- Saved for backward are the latent, Eq. 3's own latent and the low-frequency pairs as they came in (exact in any dtype,
  a quarter of q and k at r_low = 0.25), and no signal: backward computes U again and rotates the pairs again. The pairs
  could be had from the output as Z* / (1 + alpha S), which the keys forbid: nothing keeps S_K from -1 / alpha.
"""

import triton
import triton.language as tl

from rosa_kernels.heads import copy_rest, head_rows, rotate, sigmoid, token_block
from rosa_kernels.roae_tiles import (
    load_head_rows,
    load_high_tile,
    load_low_rotary,
    load_low_tile,
    load_rows,
    product,
    store_high_tile,
    store_low,
    store_low_tile,
    store_rows,
)


@triton.jit
def _place(blocks, groups, key_parts, keys_ahead):
    """The block of tokens of this program and its part of the work on that: `key_parts` for the keys, then `groups` of
    query heads. With `keys_ahead` the keys of all blocks come first."""
    i = tl.program_id(0)
    parts = key_parts + groups
    i_block, i_part = i // parts, i % parts
    if keys_ahead:
        i_query = i - blocks * key_parts
        if i_query < 0:
            i_block, i_part = i // key_parts, i % key_parts
        else:
            i_block, i_part = i_query // groups, key_parts + i_query % groups
    return i_block, i_part


@triton.jit
def _key_latent(b_latent, up, gqa_down, first, last, shape):
    """Columns `first` to `last` of S (Eq. 2) times W_GQA's first factor (Eq. 3), `[BLOCK_T, BLOCK_R]`."""
    COLUMNS: tl.constexpr = shape.HEADS * 2 * shape.LOW_PAIRS
    o_r = tl.arange(0, shape.BLOCK_R)
    m_r = o_r < shape.RANK
    b_key_latent = tl.zeros((shape.BLOCK_T, shape.BLOCK_R), shape.COMPUTE)
    for i_s in tl.range(first, last, shape.BLOCK_S, num_stages=2):
        o_s = i_s + tl.arange(0, shape.BLOCK_S)
        m_s = (o_s < COLUMNS) | (COLUMNS % shape.BLOCK_S == 0)
        b_up = tl.load(up + o_s[:, None] * shape.RANK + o_r[None, :], mask=m_s[:, None] & m_r[None, :], other=0.0)
        b_gqa = tl.load(gqa_down + o_r[:, None] * COLUMNS + o_s[None, :], mask=m_r[:, None] & m_s[None, :], other=0.0)
        b_u = tl.dot(b_latent, tl.trans(b_up.to(shape.DOT)), input_precision="ieee", out_dtype=shape.COMPUTE)
        b_s = b_u * sigmoid(b_u)
        if COLUMNS % shape.BLOCK_S != 0:
            b_s = tl.where(m_s[None, :], b_s, 0.0)
        b_key_latent = tl.dot(
            b_s.to(shape.DOT), tl.trans(b_gqa.to(shape.DOT)), b_key_latent,
            input_precision="ieee", out_dtype=shape.COMPUTE,
        )  # fmt: skip
    if shape.RANK < shape.BLOCK_R:
        b_key_latent = tl.where(m_r[None, :], b_key_latent, 0.0)
    return b_key_latent


@triton.jit
def _sum_of_parts(b_x, partials, arrived, i_block, i_part, parts, shape):
    """b_x of all programs of a block added up in order, for the last of them to come here, and whether this is it."""
    o_t = tl.arange(0, shape.BLOCK_T)
    m_t = o_t < shape.BLOCK_T
    first = (i_block * parts).to(tl.int64) * shape.BLOCK_T + o_t
    store_rows(partials, first + i_part * shape.BLOCK_T, m_t, b_x, shape.BLOCK_R, shape.BLOCK_R)
    tl.debug_barrier()  # all threads have stored before one of them says so
    is_last = tl.atomic_add(arrived + i_block, 1, sem="acq_rel") == parts - 1
    if is_last:
        b_x = tl.zeros((shape.BLOCK_T, shape.BLOCK_R), shape.COMPUTE)
        for i in range(parts):
            b_x += load_rows(partials, first + i * shape.BLOCK_T, m_t, shape.BLOCK_R, shape.BLOCK_R)
    return b_x, is_last


@triton.jit
def _load_and_project(b_latent, w, x, i_head, rotary, t, shape):
    """A head's pairs of the latent times its rows of a weight, and its two tiles."""
    b_w = load_head_rows(w, i_head, shape)
    p_row = head_rows(x, i_head, t)
    high = load_high_tile(p_row, x.d, rotary, t, shape)
    b_y = product(b_latent, tl.trans(b_w), shape)
    return b_y, high, load_low_tile(p_row, x.d, t.m, shape)


@triton.jit
def _forward_head(high, low, b_s, low_rotary, x, x_out, p_low, i_head, alpha, t, STORE: tl.constexpr, shape):
    """One head of the block: RoPE, then Eq. 4 on the low-frequency pairs as Z* = Z * (1 + alpha * S)."""
    p_out = head_rows(x_out, i_head, t)
    if shape.SPLIT > 0:
        b_re, b_im = rotate(high[0], high[1], high[2], high[3], shape)
        store_high_tile(p_out, x_out.d, b_re, b_im, t.m, shape)
    b_z_re, b_z_im = rotate(low[0], low[1], low_rotary[0], low_rotary[1], shape)
    b_re, b_im = tl.split(tl.join(b_z_re, b_z_im) * (1 + alpha * b_s))
    store_low_tile(p_out, x_out.d, b_re, b_im, t.m, shape)
    copy_rest(head_rows(x, i_head, t), x.d, p_out, x_out.d, t.m, shape)
    if STORE:
        store_low(p_low + i_head * (2 * shape.LOW_PAIRS), low[0], low[1], t.m, shape)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows", "heads_per_program", "key_parts", "keys_ahead_below"])
def roae_forward_kernel(
    q, k, q_out, k_out, rotary, latent, up, gqa_down, gqa_up, low, key_latent, partials, arrived, alpha: tl.float64,
    tokens, seq, cos_rows, heads_per_program, key_parts, keys_ahead_below,
    GROUPED: tl.constexpr, STORE: tl.constexpr, shape,
):  # fmt: skip
    COLUMNS: tl.constexpr = shape.HEADS * 2 * shape.LOW_PAIRS
    KEY_COLUMNS: tl.constexpr = shape.KEY_HEADS * 2 * shape.LOW_PAIRS
    alpha = tl.full((), alpha, shape.COMPUTE)
    groups = tl.cdiv(shape.HEADS, heads_per_program)
    i_block, i_part = _place(tl.cdiv(tokens, shape.BLOCK_T), groups, key_parts, tokens < keys_ahead_below)
    t = token_block(i_block, tokens, seq, cos_rows, shape.BLOCK_T)
    low_rotary = load_low_rotary(rotary, t, shape)
    p_low = low + (t.o * (COLUMNS + KEY_COLUMNS))[:, None]
    b_latent = load_rows(latent, t.o, t.m, shape.RANK, shape.BLOCK_R).to(shape.DOT)

    if GROUPED and i_part < key_parts:
        columns = tl.cdiv(tl.cdiv(COLUMNS, shape.BLOCK_S), key_parts) * shape.BLOCK_S
        first = i_part * columns
        b_sum = _key_latent(b_latent, up, gqa_down, first, tl.minimum(first + columns, COLUMNS), shape)
        is_last = key_parts == 1
        if key_parts > 1:
            b_sum, is_last = _sum_of_parts(b_sum, partials, arrived, i_block, i_part, key_parts, shape)
        if is_last:
            b_key_latent = b_sum.to(shape.DOT)
            if STORE:
                store_rows(key_latent, t.o, t.m, b_key_latent, shape.RANK, shape.BLOCK_R)
            for i in range(shape.KEY_HEADS):
                b_s, high, k_low = _load_and_project(b_key_latent, gqa_up, k, i, rotary, t, shape)
                _forward_head(high, k_low, b_s, low_rotary, k, k_out, p_low + COLUMNS, i, alpha, t, STORE, shape)
    else:
        first = (i_part - key_parts) * heads_per_program
        last = tl.minimum(first + heads_per_program, shape.HEADS)
        for i in tl.range(first, last, num_stages=shape.HEAD_STAGES):
            b_u, high, q_low = _load_and_project(b_latent, up, q, i, rotary, t, shape)
            b_s = b_u * sigmoid(b_u)
            _forward_head(high, q_low, b_s, low_rotary, q, q_out, p_low, i, alpha, t, STORE, shape)
            if not GROUPED:
                p_row = head_rows(k, i, t)
                high = load_high_tile(p_row, k.d, rotary, t, shape)
                k_low = load_low_tile(p_row, k.d, t.m, shape)
                _forward_head(high, k_low, b_s, low_rotary, k, k_out, p_low + COLUMNS, i, alpha, t, STORE, shape)
