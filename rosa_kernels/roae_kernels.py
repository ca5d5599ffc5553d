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
- The pairs of a head are taken in two tiles: the last BLOCK_LOW of them, from pair SPLIT on, where the low-frequency
  pairs are, and those before, which only rotate. SPLIT leaves both on wide boundaries; a column of the low tile that
  has no signal gets S = 0.
- For the signal's gradient, forward keeps a compact copy of the low-frequency pairs as they came in (exact in any
  dtype, a quarter of q and k at r_low = 0.25), and backward rotates it again.
- What stands beside a tile's own columns is 0 after a product too, where a NaN or infinity has met the zeros there: it
  must not reach the high-frequency pairs. Tiles without such columns cost nothing for that.
- cos and sin of the high-frequency pairs are read for every head, from cache: kept, they would cost 32 registers.
"""

import triton
import triton.language as tl

from rosa_kernels.tiles import copy_rest, load_pairs, load_rotary, row_pointers, store_pairs


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
def _low_columns(PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_LOW: tl.constexpr):
    """Which of a head's n low-frequency pairs stands in each column of the low tile, and where there is one."""
    o = tl.arange(0, BLOCK_LOW) - (PAIRS - LOW_PAIRS - SPLIT)
    return o, (o >= 0) & (o < LOW_PAIRS)


@triton.jit
def _load_low(p_row, m_t, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_LOW: tl.constexpr,
              COMPUTE: tl.constexpr):  # fmt: skip
    """A head's d_low numbers of every token, n real parts and n imaginary ones, `[BLOCK_T, BLOCK_LOW]` each."""
    o, m = _low_columns(PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
    o, m = o[None, :], m_t[:, None] & m[None, :]
    b_re, b_im = tl.load(p_row + o, mask=m, other=0.0), tl.load(p_row + (LOW_PAIRS + o), mask=m, other=0.0)
    return b_re.to(COMPUTE), b_im.to(COMPUTE)


@triton.jit
def _store_low(p_row, b_re, b_im, m_t, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, SPLIT: tl.constexpr,
               BLOCK_LOW: tl.constexpr):  # fmt: skip
    """The inverse of `_load_low`."""
    o, m = _low_columns(PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
    o, m = o[None, :], m_t[:, None] & m[None, :]
    tl.store(p_row + o, b_re.to(p_row.dtype.element_ty), mask=m)
    tl.store(p_row + (LOW_PAIRS + o), b_im.to(p_row.dtype.element_ty), mask=m)


@triton.jit
def _load_head_rows(w, i_head, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, SPLIT: tl.constexpr,
                    BLOCK_LOW: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """One head's rows of a weight `[heads * d_low, rank]`: of real and of imaginary parts, `[BLOCK_LOW, BLOCK_R]`."""
    o, m = _low_columns(PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
    o_r = tl.arange(0, BLOCK_R)[None, :]
    m = m[:, None] & (o_r < RANK)
    p = w + i_head * (2 * LOW_PAIRS * RANK)
    b_re = tl.load(p + (o[:, None] * RANK + o_r), mask=m, other=0.0)
    b_im = tl.load(p + ((LOW_PAIRS + o[:, None]) * RANK + o_r), mask=m, other=0.0)
    return b_re, b_im


@triton.jit
def _load_head_columns(
    w,
    i_head,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    LOW_PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One head's columns of a weight `[rank, heads * d_low]`: real and imaginary parts, `[BLOCK_R, BLOCK_LOW]`."""
    o, m = _low_columns(PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
    o_r = tl.arange(0, BLOCK_R)[:, None]
    m = (o_r < RANK) & m[None, :]
    p = w + i_head * (2 * LOW_PAIRS)
    b_re = tl.load(p + (o_r * (2 * HEADS * LOW_PAIRS) + o[None, :]), mask=m, other=0.0)
    b_im = tl.load(p + (o_r * (2 * HEADS * LOW_PAIRS) + LOW_PAIRS + o[None, :]), mask=m, other=0.0)
    return b_re, b_im


@triton.jit
def _project(b_latent, w, i_head, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, SPLIT: tl.constexpr,
             BLOCK_LOW: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """A latent `[BLOCK_T, BLOCK_R]` times one head's rows of a weight: real and imaginary, `[BLOCK_T, BLOCK_LOW]`."""
    b_w_re, b_w_im = _load_head_rows(w, i_head, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, RANK, BLOCK_R)
    b_re = tl.dot(b_latent, tl.trans(b_w_re.to(b_latent.dtype)), input_precision="ieee", out_dtype=COMPUTE)
    b_im = tl.dot(b_latent, tl.trans(b_w_im.to(b_latent.dtype)), input_precision="ieee", out_dtype=COMPUTE)
    if LOW_PAIRS < BLOCK_LOW:
        _, m = _low_columns(PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
        b_re, b_im = tl.where(m[None, :], b_re, 0.0), tl.where(m[None, :], b_im, 0.0)
    return b_re, b_im


@triton.jit
def _forward_head(
    p_in, p_out, p_low, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t, in_stride_d, out_stride_d,
    cos_stride_row, sin_stride_row,
    STORE_LOW: tl.constexpr, ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_REST: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: RoPE, then Eq. 4 on the low-frequency pairs as Z* = Z * (1 + alpha * S)."""
    if SPLIT > 0:
        b_cos, b_sin = load_rotary(
            cos, sin, o_row, m_t, cos_stride_row, sin_stride_row, 0, SPLIT, BLOCK_HIGH, ROTARY_STEP, COMPUTE
        )
        b_re, b_im = load_pairs(p_in, in_stride_d, m_t, 0, SPLIT, BLOCK_HIGH, PAIRS, INTERLEAVED, COMPUTE)
        b_z_re = b_re * b_cos - b_im * b_sin
        b_z_im = b_im * b_cos + b_re * b_sin
        store_pairs(p_out, out_stride_d, b_z_re, b_z_im, m_t, 0, SPLIT, BLOCK_HIGH, PAIRS, INTERLEAVED)
    b_re, b_im = load_pairs(p_in, in_stride_d, m_t, SPLIT, PAIRS - SPLIT, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE)
    b_z_re = (b_re * b_low_cos - b_im * b_low_sin) * (1 + ALPHA * b_s_re)
    b_z_im = (b_im * b_low_cos + b_re * b_low_sin) * (1 + ALPHA * b_s_im)
    store_pairs(p_out, out_stride_d, b_z_re, b_z_im, m_t, SPLIT, PAIRS - SPLIT, BLOCK_LOW, PAIRS, INTERLEAVED)
    copy_rest(p_in, in_stride_d, p_out, out_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)
    if STORE_LOW:
        _store_low(p_low, b_re, b_im, m_t, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)


@triton.jit
def _backward_head(
    p_dout, p_dx, b_dy_re, b_dy_im, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t, dout_stride_d,
    dx_stride_d, cos_stride_row, sin_stride_row,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_REST: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: dX = R^T (g * dY) with g = 1 + alpha * S; dY of the low-frequency pairs comes loaded."""
    if SPLIT > 0:
        b_cos, b_sin = load_rotary(
            cos, sin, o_row, m_t, cos_stride_row, sin_stride_row, 0, SPLIT, BLOCK_HIGH, ROTARY_STEP, COMPUTE
        )
        b_re, b_im = load_pairs(p_dout, dout_stride_d, m_t, 0, SPLIT, BLOCK_HIGH, PAIRS, INTERLEAVED, COMPUTE)
        b_dx_re = b_re * b_cos + b_im * b_sin
        b_dx_im = b_im * b_cos - b_re * b_sin
        store_pairs(p_dx, dx_stride_d, b_dx_re, b_dx_im, m_t, 0, SPLIT, BLOCK_HIGH, PAIRS, INTERLEAVED)
    b_dz_re = b_dy_re * (1 + ALPHA * b_s_re)
    b_dz_im = b_dy_im * (1 + ALPHA * b_s_im)
    b_dx_re = b_dz_re * b_low_cos + b_dz_im * b_low_sin
    b_dx_im = b_dz_im * b_low_cos - b_dz_re * b_low_sin
    store_pairs(p_dx, dx_stride_d, b_dx_re, b_dx_im, m_t, SPLIT, PAIRS - SPLIT, BLOCK_LOW, PAIRS, INTERLEAVED)
    copy_rest(p_dout, dout_stride_d, p_dx, dx_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)


@triton.jit
def _signal_gradient(
    p_low, b_dy_re, b_dy_im, b_low_cos, b_low_sin, m_t,
    ALPHA: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_LOW: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: dS = alpha * dY * Z, with Z the rotated low-frequency pairs."""
    b_re, b_im = _load_low(p_low, m_t, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, COMPUTE)
    b_ds_re = ALPHA * b_dy_re * (b_re * b_low_cos - b_im * b_low_sin)
    b_ds_im = ALPHA * b_dy_im * (b_im * b_low_cos + b_re * b_low_sin)
    return b_ds_re, b_ds_im


@triton.jit
def _silu_gradient(b_u):
    """S = SiLU(U) and its derivative with respect to U."""
    b_sigmoid = tl.sigmoid(b_u)
    b_s = b_u * b_sigmoid
    return b_s, b_sigmoid + b_s * (1 - b_sigmoid)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows", "heads_per_program"])
def roae_forward_kernel(
    q, k, cos, sin, latent, up, gqa_down, gqa_up, q_out, k_out, low, key_latent,
    tokens, seq, cos_rows, heads_per_program,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    q_out_stride_b, q_out_stride_h, q_out_stride_l, q_out_stride_d,
    k_out_stride_b, k_out_stride_h, k_out_stride_l, k_out_stride_d,
    cos_stride_row, sin_stride_row,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr, GROUPED: tl.constexpr,
    STORE: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    RANK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    groups = tl.cdiv(HEADS, heads_per_program) + GROUPED
    i_group = tl.program_id(0) % groups - GROUPED  # -1: the keys of grouped-query attention, the longest work, first
    o_t = (tl.program_id(0) // groups) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    o_row = o_t % cos_rows
    b_low_cos, b_low_sin = load_rotary(
        cos, sin, o_row, m_t, cos_stride_row, sin_stride_row,
        SPLIT, PAIRS - SPLIT, BLOCK_LOW, ROTARY_STEP, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW))[:, None]
    b_latent = _load_rows(latent, o_t, m_t, RANK, BLOCK_R).to(DOT)

    if GROUPED and i_group < 0:
        S_COLUMNS: tl.constexpr = HEADS * D_LOW
        b_key_latent = tl.zeros((BLOCK_T, BLOCK_R), COMPUTE)
        for i_s in range(0, S_COLUMNS, BLOCK_S):
            o_s = i_s + tl.arange(0, BLOCK_S)
            o_r = tl.arange(0, BLOCK_R)
            m_s, m_r = o_s < S_COLUMNS, o_r < RANK
            b_up = tl.load(up + o_s[:, None] * RANK + o_r[None, :], mask=m_s[:, None] & m_r[None, :], other=0.0)
            b_u = tl.dot(b_latent, tl.trans(b_up.to(DOT)), input_precision="ieee", out_dtype=COMPUTE)
            p_gqa = gqa_down + o_r[:, None] * S_COLUMNS + o_s[None, :]
            b_gqa = tl.load(p_gqa, mask=m_r[:, None] & m_s[None, :], other=0.0)
            b_s = (b_u * tl.sigmoid(b_u)).to(DOT)
            if S_COLUMNS % BLOCK_S != 0:
                b_s = tl.where(m_s[None, :], b_s, 0.0)
            b_key_latent = tl.dot(b_s, tl.trans(b_gqa.to(DOT)), b_key_latent, input_precision="ieee", out_dtype=COMPUTE)
        b_key_latent = b_key_latent.to(DOT)
        if RANK < BLOCK_R:
            b_key_latent = tl.where(tl.arange(0, BLOCK_R)[None, :] < RANK, b_key_latent, 0.0)
        if STORE:
            _store_rows(key_latent, o_t, m_t, b_key_latent, RANK, BLOCK_R)
        for i_k in range(KEY_HEADS):
            b_s_re, b_s_im = _project(
                b_key_latent, gqa_up, i_k, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, RANK, BLOCK_R, COMPUTE
            )
            _forward_head(
                row_pointers(k, i_b, i_l, i_k, k_stride_b, k_stride_h, k_stride_l),
                row_pointers(k_out, i_b, i_l, i_k, k_out_stride_b, k_out_stride_h, k_out_stride_l),
                p_low + (HEADS + i_k) * D_LOW, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t,
                k_stride_d, k_out_stride_d, cos_stride_row, sin_stride_row,
                STORE, ALPHA, INTERLEAVED, ROTARY_STEP, HEAD_DIM, PAIRS, LOW_PAIRS, SPLIT, BLOCK_HIGH, BLOCK_LOW,
                BLOCK_REST,
                COMPUTE,
            )  # fmt: skip
    for i in range(tl.maximum(i_group, 0) * heads_per_program, tl.minimum((i_group + 1) * heads_per_program, HEADS)):
        b_u_re, b_u_im = _project(b_latent, up, i, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, RANK, BLOCK_R, COMPUTE)
        b_s_re, b_s_im = b_u_re * tl.sigmoid(b_u_re), b_u_im * tl.sigmoid(b_u_im)
        _forward_head(
            row_pointers(q, i_b, i_l, i, q_stride_b, q_stride_h, q_stride_l),
            row_pointers(q_out, i_b, i_l, i, q_out_stride_b, q_out_stride_h, q_out_stride_l),
            p_low + i * D_LOW, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t, q_stride_d, q_out_stride_d,
            cos_stride_row, sin_stride_row,
            STORE, ALPHA, INTERLEAVED, ROTARY_STEP, HEAD_DIM, PAIRS, LOW_PAIRS, SPLIT, BLOCK_HIGH, BLOCK_LOW,
            BLOCK_REST, COMPUTE,
        )  # fmt: skip
        if not GROUPED:
            _forward_head(
                row_pointers(k, i_b, i_l, i, k_stride_b, k_stride_h, k_stride_l),
                row_pointers(k_out, i_b, i_l, i, k_out_stride_b, k_out_stride_h, k_out_stride_l),
                p_low + (HEADS + i) * D_LOW, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t,
                k_stride_d, k_out_stride_d, cos_stride_row, sin_stride_row,
                STORE, ALPHA, INTERLEAVED, ROTARY_STEP, HEAD_DIM, PAIRS, LOW_PAIRS, SPLIT, BLOCK_HIGH, BLOCK_LOW,
                BLOCK_REST,
                COMPUTE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows"])
def roae_backward_keys_kernel(
    dk_out, cos, sin, gqa_up, low, key_latent, dk, dkey_signal, dkey_latent,
    tokens, seq, cos_rows,
    dk_out_stride_b, dk_out_stride_h, dk_out_stride_l, dk_out_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d,
    cos_stride_row, sin_stride_row,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DU: tl.constexpr, NEED_DGQA: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    RANK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    o_row = o_t % cos_rows
    b_low_cos, b_low_sin = load_rotary(
        cos, sin, o_row, m_t, cos_stride_row, sin_stride_row,
        SPLIT, PAIRS - SPLIT, BLOCK_LOW, ROTARY_STEP, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    if NEED_DX:
        b_key_latent = _load_rows(key_latent, o_t, m_t, RANK, BLOCK_R).to(DOT)
        for i in range(KEY_HEADS):
            b_s_re, b_s_im = _project(
                b_key_latent, gqa_up, i, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, RANK, BLOCK_R, COMPUTE
            )
            p_dk_out = row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l)
            b_dk_re, b_dk_im = load_pairs(
                p_dk_out, dk_out_stride_d, m_t, SPLIT, PAIRS - SPLIT, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
            )
            _backward_head(
                p_dk_out, row_pointers(dk, i_b, i_l, i, dk_stride_b, dk_stride_h, dk_stride_l),
                b_dk_re, b_dk_im, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t, dk_out_stride_d,
                dk_stride_d, cos_stride_row, sin_stride_row,
                ALPHA, INTERLEAVED, ROTARY_STEP, HEAD_DIM, PAIRS, LOW_PAIRS, SPLIT, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST,
                COMPUTE,
            )  # fmt: skip
    if NEED_DU:
        b_dkey_latent = tl.zeros((BLOCK_T, BLOCK_R), COMPUTE)
        for i in range(KEY_HEADS):
            p_dk_out = row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l)
            b_dk_re, b_dk_im = load_pairs(
                p_dk_out, dk_out_stride_d, m_t, SPLIT, PAIRS - SPLIT, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
            )
            p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW) + (HEADS + i) * D_LOW)[:, None]
            b_ds_re, b_ds_im = _signal_gradient(
                p_low, b_dk_re, b_dk_im, b_low_cos, b_low_sin, m_t, ALPHA, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, COMPUTE
            )
            b_w_re, b_w_im = _load_head_rows(gqa_up, i, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, RANK, BLOCK_R)
            b_dkey_latent = tl.dot(
                b_ds_re.to(DOT), b_w_re.to(DOT), b_dkey_latent, input_precision="ieee", out_dtype=COMPUTE
            )
            b_dkey_latent = tl.dot(
                b_ds_im.to(DOT), b_w_im.to(DOT), b_dkey_latent, input_precision="ieee", out_dtype=COMPUTE
            )
            if NEED_DGQA:
                p_ds = dkey_signal + (o_t * (KEY_HEADS * D_LOW) + i * D_LOW)[:, None]
                _store_low(p_ds, b_ds_re, b_ds_im, m_t, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
        _store_rows(dkey_latent, o_t, m_t, b_dkey_latent, RANK, BLOCK_R)


@triton.jit(do_not_specialize=["tokens", "seq", "cos_rows", "heads_per_program"])
def roae_backward_kernel(
    dq_out, dk_out, cos, sin, latent, up, gqa_down, low, dkey_latent, dq, dk, du, signal,
    tokens, seq, cos_rows, heads_per_program,
    dq_out_stride_b, dq_out_stride_h, dq_out_stride_l, dq_out_stride_d,
    dk_out_stride_b, dk_out_stride_h, dk_out_stride_l, dk_out_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_l, dq_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d,
    cos_stride_row, sin_stride_row,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr, GROUPED: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DU: tl.constexpr, NEED_DGQA: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    RANK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    D_LOW: tl.constexpr = 2 * LOW_PAIRS
    groups = tl.cdiv(HEADS, heads_per_program)
    i_group = tl.program_id(0) % groups
    o_t = (tl.program_id(0) // groups) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    i_b, i_l = (o_t // seq).to(tl.int64), (o_t % seq).to(tl.int64)
    o_row = o_t % cos_rows
    b_low_cos, b_low_sin = load_rotary(
        cos, sin, o_row, m_t, cos_stride_row, sin_stride_row,
        SPLIT, PAIRS - SPLIT, BLOCK_LOW, ROTARY_STEP, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW))[:, None]
    b_latent = _load_rows(latent, o_t, m_t, RANK, BLOCK_R).to(DOT)
    if GROUPED and NEED_DU:
        b_dkey_latent = _load_rows(dkey_latent, o_t, m_t, RANK, BLOCK_R).to(DOT)
    for i in range(i_group * heads_per_program, tl.minimum((i_group + 1) * heads_per_program, HEADS)):
        b_u_re, b_u_im = _project(b_latent, up, i, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, RANK, BLOCK_R, COMPUTE)
        b_s_re, b_slope_re = _silu_gradient(b_u_re)
        b_s_im, b_slope_im = _silu_gradient(b_u_im)
        p_dq_out = row_pointers(dq_out, i_b, i_l, i, dq_out_stride_b, dq_out_stride_h, dq_out_stride_l)
        b_dq_re, b_dq_im = load_pairs(
            p_dq_out, dq_out_stride_d, m_t, SPLIT, PAIRS - SPLIT, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
        )
        if not GROUPED:
            p_dk_out = row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l)
            b_dk_re, b_dk_im = load_pairs(
                p_dk_out, dk_out_stride_d, m_t, SPLIT, PAIRS - SPLIT, BLOCK_LOW, PAIRS, INTERLEAVED, COMPUTE
            )
        if NEED_DU:  # dU = dS * SiLU'(U)
            b_ds_re, b_ds_im = _signal_gradient(
                p_low + i * D_LOW,
                b_dq_re,
                b_dq_im,
                b_low_cos,
                b_low_sin,
                m_t,
                ALPHA,
                PAIRS,
                LOW_PAIRS,
                SPLIT,
                BLOCK_LOW,
                COMPUTE,
            )
            if GROUPED:
                b_w_re, b_w_im = _load_head_columns(
                    gqa_down, i, HEADS, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW, RANK, BLOCK_R
                )
                b_ds_re += tl.dot(b_dkey_latent, b_w_re.to(DOT), input_precision="ieee", out_dtype=COMPUTE)
                b_ds_im += tl.dot(b_dkey_latent, b_w_im.to(DOT), input_precision="ieee", out_dtype=COMPUTE)
            else:
                p_low_k = p_low + (HEADS + i) * D_LOW
                b_dks_re, b_dks_im = _signal_gradient(
                    p_low_k,
                    b_dk_re,
                    b_dk_im,
                    b_low_cos,
                    b_low_sin,
                    m_t,
                    ALPHA,
                    PAIRS,
                    LOW_PAIRS,
                    SPLIT,
                    BLOCK_LOW,
                    COMPUTE,
                )
                b_ds_re += b_dks_re
                b_ds_im += b_dks_im
            o_s = (o_t * (HEADS * D_LOW) + i * D_LOW)[:, None]
            _store_low(du + o_s, b_ds_re * b_slope_re, b_ds_im * b_slope_im, m_t, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
            if NEED_DGQA:
                _store_low(signal + o_s, b_s_re, b_s_im, m_t, PAIRS, LOW_PAIRS, SPLIT, BLOCK_LOW)
        if NEED_DX:
            _backward_head(
                p_dq_out, row_pointers(dq, i_b, i_l, i, dq_stride_b, dq_stride_h, dq_stride_l),
                b_dq_re, b_dq_im, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t, dq_out_stride_d,
                dq_stride_d, cos_stride_row, sin_stride_row,
                ALPHA, INTERLEAVED, ROTARY_STEP, HEAD_DIM, PAIRS, LOW_PAIRS, SPLIT, BLOCK_HIGH, BLOCK_LOW, BLOCK_REST,
                COMPUTE,
            )  # fmt: skip
            if not GROUPED:
                _backward_head(
                    p_dk_out, row_pointers(dk, i_b, i_l, i, dk_stride_b, dk_stride_h, dk_stride_l),
                    b_dk_re, b_dk_im, b_s_re, b_s_im, cos, sin, o_row, b_low_cos, b_low_sin, m_t,
                    dk_out_stride_d, dk_stride_d, cos_stride_row, sin_stride_row,
                    ALPHA, INTERLEAVED, ROTARY_STEP, HEAD_DIM, PAIRS, LOW_PAIRS, SPLIT, BLOCK_HIGH, BLOCK_LOW,
                    BLOCK_REST, COMPUTE,
                )  # fmt: skip
