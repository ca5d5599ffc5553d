"""RoAd of queries and keys and then RoPE, u = A x and y = R u, as one launch forward and one backward over the tokens.

Notable:
- A program does one head for some blocks of tokens, one after the other, so that the vectors of Eq. 4 are made once, in
  registers. Heads are numbered through, queries first, then keys; programs of the same tokens stand side by side and
  find cos and sin in cache.
- RoAd's pairs are the rotary pairs (both tiles of a head at once) or, in RoPE's half layout, NEIGHBOURS: there either
  half of the head is split into neighbours in registers, and joined again to be rotated. Beyond the rotary part RoAd's
  pairs are neighbours in every layout.
- Variant 1 finds the gradients of angles and scales from y. Where its pairs are the rotary ones, RoPE turns y and its
  gradient alike: y . dy = u . du, whatever cos^2 + sin^2 is. Neighbours need u, which is R^T y / (cos^2 + sin^2).
- The sums and their second launch are those of `road_kernels.py`.
"""

import triton
import triton.language as tl

from rosa_kernels.road_tiles import (
    adapter_of,
    add_products,
    block_of_tokens,
    load_weights,
    no_sums,
    split_tokens,
    store_sums,
    turn,
    turn_back,
)
from rosa_kernels.tiles import copy_rest, load_pairs, load_rotary, row_pointers, store_pairs


@triton.jit
def _pairs_of_head(i_h, FIRST: tl.constexpr, STEP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The pairs of an output from pair FIRST of head i_h on, and their columns: neighbours where STEP is 1, else
    elements so far apart."""
    o = FIRST + tl.arange(0, BLOCK)[None, :]
    o_p = i_h * (HEAD_DIM // 2) + o
    o_1 = i_h * HEAD_DIM + (2 * o if STEP == 1 else o)
    return o_p, o_1, o_1 + STEP


@triton.jit
def _load_weights(
    theta, alpha, i_h, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, VARIANT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    o_p, o_1, o_2 = _pairs_of_head(i_h, FIRST, STEP, HEAD_DIM, BLOCK)
    m = tl.arange(0, BLOCK)[None, :] < COUNT
    return load_weights(theta, alpha, o_p, o_1, o_2, m, WIDTH, VARIANT, COMPUTE)


@triton.jit
def _store_sums(
    sums, b_sums, i_h, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    o_p, o_1, o_2 = _pairs_of_head(i_h, FIRST, STEP, HEAD_DIM, BLOCK)
    m = tl.arange(0, BLOCK)[None, :] < COUNT
    store_sums(sums, b_sums, o_p, o_1, o_2, m, COLUMNS, VARIANT)


@triton.jit
def _split(b_x):
    """Neighbouring columns apart."""
    return tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // 2, 2)))


@triton.jit
def _join(b_pair):
    """The inverse of `_split`."""
    return tl.reshape(tl.join(b_pair[0], b_pair[1]), (b_pair[0].shape[0], 2 * b_pair[0].shape[1]))


@triton.jit
def _forward_head(
    x, out, theta, alpha, cos, sin, i_h, i_s, i_first, span, seq, steps, cos_rows,
    x_stride_b, x_stride_h, x_stride_l, x_stride_d, out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    cos_stride_row, sin_stride_row,
    ADAPT: tl.constexpr, VARIANT: tl.constexpr, NEIGHBOURS: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROTARY_STEP: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    REST: tl.constexpr = HEAD_DIM // 2 - PAIRS  # pairs
    STEP: tl.constexpr = 1 if INTERLEAVED else PAIRS
    if ADAPT:
        if NEIGHBOURS:
            b_w = _load_weights(
                theta, alpha, i_h, 0, PAIRS // 2, 1, BLOCK_PAIRS // 2, WIDTH, HEAD_DIM, VARIANT, COMPUTE
            )
            b_w_im = _load_weights(
                theta, alpha, i_h, PAIRS // 2, PAIRS // 2, 1, BLOCK_PAIRS // 2, WIDTH, HEAD_DIM, VARIANT, COMPUTE
            )
        else:
            b_w = _load_weights(theta, alpha, i_h, 0, PAIRS, STEP, BLOCK_PAIRS, WIDTH, HEAD_DIM, VARIANT, COMPUTE)
        if REST > 0:
            b_w_rest = _load_weights(
                theta, alpha, i_h, PAIRS, REST, 1, BLOCK_REST // 2, WIDTH, HEAD_DIM, VARIANT, COMPUTE
            )
    for j in range(steps):
        o_t, m_t, i_b, i_l = block_of_tokens(i_s, i_first + j * BLOCK_T, span, seq, BLOCK_T)
        b_cos, b_sin = load_rotary(
            cos, sin, o_t % cos_rows, m_t, cos_stride_row, sin_stride_row,
            0, PAIRS, BLOCK_PAIRS, ROTARY_STEP, COMPUTE,
        )  # fmt: skip
        p_x = row_pointers(x, i_b, i_l, i_h, x_stride_b, x_stride_h, x_stride_l)
        p_out = row_pointers(out, i_b, i_l, i_h, out_stride_b, out_stride_h, out_stride_l)
        if NEIGHBOURS and ADAPT:
            b_1, b_2 = load_pairs(p_x, x_stride_d, m_t, 0, PAIRS // 2, BLOCK_PAIRS // 2, PAIRS, True, COMPUTE)
            b_re = _join(turn(b_1, b_2, b_w))
            b_1, b_2 = load_pairs(
                p_x + PAIRS * x_stride_d, x_stride_d, m_t, 0, PAIRS // 2, BLOCK_PAIRS // 2, PAIRS, True, COMPUTE
            )
            b_im = _join(turn(b_1, b_2, b_w_im))
        else:
            b_re, b_im = load_pairs(p_x, x_stride_d, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED, COMPUTE)
            if ADAPT:
                b_re, b_im = turn(b_re, b_im, b_w)
        b_y_re, b_y_im = b_re * b_cos - b_im * b_sin, b_im * b_cos + b_re * b_sin
        store_pairs(p_out, out_stride_d, b_y_re, b_y_im, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED)
        if ADAPT and REST > 0:
            b_1, b_2 = load_pairs(p_x, x_stride_d, m_t, PAIRS, REST, BLOCK_REST // 2, PAIRS, True, COMPUTE)
            b_1, b_2 = turn(b_1, b_2, b_w_rest)
            store_pairs(p_out, out_stride_d, b_1, b_2, m_t, PAIRS, REST, BLOCK_REST // 2, PAIRS, True)
        elif not ADAPT:
            copy_rest(p_x, x_stride_d, p_out, out_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)


@triton.jit(do_not_specialize=["tokens", "seq", "splits", "steps", "cos_rows"])
def rope_road_forward_kernel(
    q, k, cos, sin, theta, alpha, key_theta, key_alpha, index, q_out, k_out,
    tokens, seq, splits, steps, cos_rows,
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    q_out_stride_b, q_out_stride_h, q_out_stride_l, q_out_stride_d,
    k_out_stride_b, k_out_stride_h, k_out_stride_l, k_out_stride_d,
    cos_stride_row, sin_stride_row,
    ADAPT_Q: tl.constexpr, ADAPT_K: tl.constexpr, VARIANT: tl.constexpr, INDEXED: tl.constexpr,
    NEIGHBOURS: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    KEY_WIDTH: tl.constexpr = KEY_HEADS * HEAD_DIM
    i_h = tl.program_id(0) % (HEADS + KEY_HEADS)
    span = seq if INDEXED else tokens
    i_s, i_first = split_tokens(tl.program_id(0) // (HEADS + KEY_HEADS), splits, steps, BLOCK_T)
    i_a = adapter_of(index, i_s, INDEXED)
    if i_h < HEADS:
        _forward_head(
            q, q_out, theta + i_a * (WIDTH * VARIANT // 2), alpha + i_a * (WIDTH * VARIANT // 2),
            cos, sin, i_h, i_s, i_first, span, seq, steps, cos_rows,
            q_stride_b, q_stride_h, q_stride_l, q_stride_d,
            q_out_stride_b, q_out_stride_h, q_out_stride_l, q_out_stride_d, cos_stride_row, sin_stride_row,
            ADAPT_Q, VARIANT, NEIGHBOURS, INTERLEAVED, ROTARY_STEP, WIDTH, HEAD_DIM, PAIRS,
            BLOCK_T, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
        )  # fmt: skip
    else:
        _forward_head(
            k, k_out, key_theta + i_a * (KEY_WIDTH * VARIANT // 2), key_alpha + i_a * (KEY_WIDTH * VARIANT // 2),
            cos, sin, i_h - HEADS, i_s, i_first, span, seq, steps, cos_rows,
            k_stride_b, k_stride_h, k_stride_l, k_stride_d,
            k_out_stride_b, k_out_stride_h, k_out_stride_l, k_out_stride_d, cos_stride_row, sin_stride_row,
            ADAPT_K, VARIANT, NEIGHBOURS, INTERLEAVED, ROTARY_STEP, KEY_WIDTH, HEAD_DIM, PAIRS,
            BLOCK_T, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
        )  # fmt: skip


@triton.jit
def _backward_head(
    dout, kept, dx, theta, alpha, sums, cos, sin, i_h, i_s, i_first, span, seq, steps, cos_rows,
    dout_stride_b, dout_stride_h, dout_stride_l, dout_stride_d,
    kept_stride_b, kept_stride_h, kept_stride_l, kept_stride_d,
    dx_stride_b, dx_stride_h, dx_stride_l, dx_stride_d, cos_stride_row, sin_stride_row,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, ADAPT: tl.constexpr, VARIANT: tl.constexpr,
    NEIGHBOURS: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    REST: tl.constexpr = HEAD_DIM // 2 - PAIRS  # pairs
    STEP: tl.constexpr = 1 if INTERLEAVED else PAIRS
    HALF: tl.constexpr = PAIRS // 2
    if ADAPT and NEED_DX:
        if NEIGHBOURS:
            b_w = _load_weights(theta, alpha, i_h, 0, HALF, 1, BLOCK_PAIRS // 2, WIDTH, HEAD_DIM, VARIANT, COMPUTE)
            b_w_im = _load_weights(
                theta, alpha, i_h, HALF, HALF, 1, BLOCK_PAIRS // 2, WIDTH, HEAD_DIM, VARIANT, COMPUTE
            )
        else:
            b_w = _load_weights(theta, alpha, i_h, 0, PAIRS, STEP, BLOCK_PAIRS, WIDTH, HEAD_DIM, VARIANT, COMPUTE)
        if REST > 0:
            b_w_rest = _load_weights(
                theta, alpha, i_h, PAIRS, REST, 1, BLOCK_REST // 2, WIDTH, HEAD_DIM, VARIANT, COMPUTE
            )
    if NEIGHBOURS:
        b_sums = no_sums(BLOCK_T, BLOCK_PAIRS // 2, VARIANT, COMPUTE)
        b_sums_im = no_sums(BLOCK_T, BLOCK_PAIRS // 2, VARIANT, COMPUTE)
    else:
        b_sums = no_sums(BLOCK_T, BLOCK_PAIRS, VARIANT, COMPUTE)
    if REST > 0:
        b_sums_rest = no_sums(BLOCK_T, BLOCK_REST // 2, VARIANT, COMPUTE)
    for j in range(steps):
        o_t, m_t, i_b, i_l = block_of_tokens(i_s, i_first + j * BLOCK_T, span, seq, BLOCK_T)
        b_cos, b_sin = load_rotary(
            cos, sin, o_t % cos_rows, m_t, cos_stride_row, sin_stride_row,
            0, PAIRS, BLOCK_PAIRS, ROTARY_STEP, COMPUTE,
        )  # fmt: skip
        p_dout = row_pointers(dout, i_b, i_l, i_h, dout_stride_b, dout_stride_h, dout_stride_l)
        p_kept = row_pointers(kept, i_b, i_l, i_h, kept_stride_b, kept_stride_h, kept_stride_l)
        p_dx = row_pointers(dx, i_b, i_l, i_h, dx_stride_b, dx_stride_h, dx_stride_l)
        b_dy_re, b_dy_im = load_pairs(p_dout, dout_stride_d, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED, COMPUTE)
        b_re, b_im = b_dy_re * b_cos + b_dy_im * b_sin, b_dy_im * b_cos - b_dy_re * b_sin  # du = R^T dy
        if NEIGHBOURS and ADAPT:
            b_d1, b_d2 = _split(b_re)
            b_d3, b_d4 = _split(b_im)
            if NEED_SUMS:
                if VARIANT == 1:
                    b_y_re, b_y_im = load_pairs(
                        p_kept, kept_stride_d, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, False, COMPUTE
                    )
                    b_norm = b_cos * b_cos + b_sin * b_sin
                    b_norm = tl.where(b_norm == 0, 0.0, 1 / tl.where(b_norm == 0, 1.0, b_norm))
                    b_1, b_2 = _split((b_y_re * b_cos + b_y_im * b_sin) * b_norm)
                    b_3, b_4 = _split((b_y_im * b_cos - b_y_re * b_sin) * b_norm)
                else:
                    b_1, b_2 = load_pairs(p_kept, kept_stride_d, m_t, 0, HALF, BLOCK_PAIRS // 2, PAIRS, True, COMPUTE)
                    b_3, b_4 = load_pairs(
                        p_kept + PAIRS * kept_stride_d, kept_stride_d, m_t, 0, HALF, BLOCK_PAIRS // 2, PAIRS, True,
                        COMPUTE,
                    )  # fmt: skip
                b_sums = add_products(b_sums, b_d1, b_d2, b_1, b_2, VARIANT)
                b_sums_im = add_products(b_sums_im, b_d3, b_d4, b_3, b_4, VARIANT)
            if NEED_DX:
                b_re, b_im = _join(turn_back(b_d1, b_d2, b_w)), _join(turn_back(b_d3, b_d4, b_w_im))
        elif ADAPT:
            if NEED_SUMS:
                b_1, b_2 = load_pairs(p_kept, kept_stride_d, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED, COMPUTE)
                if VARIANT == 1:
                    b_sums = add_products(b_sums, b_dy_re, b_dy_im, b_1, b_2, VARIANT)
                else:
                    b_sums = add_products(b_sums, b_re, b_im, b_1, b_2, VARIANT)
            if NEED_DX:
                b_re, b_im = turn_back(b_re, b_im, b_w)
        if NEED_DX:
            store_pairs(p_dx, dx_stride_d, b_re, b_im, m_t, 0, PAIRS, BLOCK_PAIRS, PAIRS, INTERLEAVED)
        if ADAPT and REST > 0:
            b_d1, b_d2 = load_pairs(p_dout, dout_stride_d, m_t, PAIRS, REST, BLOCK_REST // 2, PAIRS, True, COMPUTE)
            if NEED_SUMS:
                b_1, b_2 = load_pairs(p_kept, kept_stride_d, m_t, PAIRS, REST, BLOCK_REST // 2, PAIRS, True, COMPUTE)
                b_sums_rest = add_products(b_sums_rest, b_d1, b_d2, b_1, b_2, VARIANT)
            if NEED_DX:
                b_d1, b_d2 = turn_back(b_d1, b_d2, b_w_rest)
                store_pairs(p_dx, dx_stride_d, b_d1, b_d2, m_t, PAIRS, REST, BLOCK_REST // 2, PAIRS, True)
        elif NEED_DX:
            copy_rest(p_dout, dout_stride_d, p_dx, dx_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)
    if NEED_SUMS:
        if NEIGHBOURS:
            _store_sums(sums, b_sums, i_h, 0, HALF, 1, BLOCK_PAIRS // 2, HEAD_DIM, COLUMNS, VARIANT)
            _store_sums(sums, b_sums_im, i_h, HALF, HALF, 1, BLOCK_PAIRS // 2, HEAD_DIM, COLUMNS, VARIANT)
        else:
            _store_sums(sums, b_sums, i_h, 0, PAIRS, STEP, BLOCK_PAIRS, HEAD_DIM, COLUMNS, VARIANT)
        if REST > 0:
            _store_sums(sums, b_sums_rest, i_h, PAIRS, REST, 1, BLOCK_REST // 2, HEAD_DIM, COLUMNS, VARIANT)


@triton.jit(do_not_specialize=["tokens", "seq", "splits", "steps", "cos_rows"])
def rope_road_backward_kernel(
    dq_out, dk_out, cos, sin, theta, alpha, key_theta, key_alpha, index, q_kept, k_kept, dq, dk, sums,
    tokens, seq, splits, steps, cos_rows,
    dq_out_stride_b, dq_out_stride_h, dq_out_stride_l, dq_out_stride_d,
    dk_out_stride_b, dk_out_stride_h, dk_out_stride_l, dk_out_stride_d,
    q_kept_stride_b, q_kept_stride_h, q_kept_stride_l, q_kept_stride_d,
    k_kept_stride_b, k_kept_stride_h, k_kept_stride_l, k_kept_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_l, dq_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d,
    cos_stride_row, sin_stride_row,
    NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr, NEED_SUMS: tl.constexpr, NEED_KEY_SUMS: tl.constexpr,
    ADAPT_Q: tl.constexpr, ADAPT_K: tl.constexpr, VARIANT: tl.constexpr, INDEXED: tl.constexpr,
    NEIGHBOURS: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY_STEP: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """dq and dk, and a row of sums for the tokens of a program: the columns of the queries, then those of the keys."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    KEY_WIDTH: tl.constexpr = KEY_HEADS * HEAD_DIM
    QUERY_COLUMNS: tl.constexpr = (WIDTH // 2 if VARIANT == 1 else WIDTH) if NEED_SUMS else 0
    KEY_COLUMNS: tl.constexpr = (KEY_WIDTH // 2 if VARIANT == 1 else KEY_WIDTH) if NEED_KEY_SUMS else 0
    COLUMNS: tl.constexpr = QUERY_COLUMNS + KEY_COLUMNS
    i_h, i_t = tl.program_id(0) % (HEADS + KEY_HEADS), tl.program_id(0) // (HEADS + KEY_HEADS)
    span = seq if INDEXED else tokens
    i_s, i_first = split_tokens(i_t, splits, steps, BLOCK_T)
    i_a = adapter_of(index, i_s, INDEXED)
    p_sums = sums + i_t.to(tl.int64) * (2 * COLUMNS)
    if i_h < HEADS:
        _backward_head(
            dq_out, q_kept, dq, theta + i_a * (WIDTH * VARIANT // 2), alpha + i_a * (WIDTH * VARIANT // 2), p_sums,
            cos, sin, i_h, i_s, i_first, span, seq, steps, cos_rows,
            dq_out_stride_b, dq_out_stride_h, dq_out_stride_l, dq_out_stride_d,
            q_kept_stride_b, q_kept_stride_h, q_kept_stride_l, q_kept_stride_d,
            dq_stride_b, dq_stride_h, dq_stride_l, dq_stride_d, cos_stride_row, sin_stride_row,
            NEED_DQ, NEED_SUMS, ADAPT_Q, VARIANT, NEIGHBOURS, INTERLEAVED, ROTARY_STEP, WIDTH, COLUMNS,
            HEAD_DIM, PAIRS, BLOCK_T, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
        )  # fmt: skip
    else:
        _backward_head(
            dk_out, k_kept, dk, key_theta + i_a * (KEY_WIDTH * VARIANT // 2),
            key_alpha + i_a * (KEY_WIDTH * VARIANT // 2), p_sums + QUERY_COLUMNS,
            cos, sin, i_h - HEADS, i_s, i_first, span, seq, steps, cos_rows,
            dk_out_stride_b, dk_out_stride_h, dk_out_stride_l, dk_out_stride_d,
            k_kept_stride_b, k_kept_stride_h, k_kept_stride_l, k_kept_stride_d,
            dk_stride_b, dk_stride_h, dk_stride_l, dk_stride_d, cos_stride_row, sin_stride_row,
            NEED_DK, NEED_KEY_SUMS, ADAPT_K, VARIANT, NEIGHBOURS, INTERLEAVED, ROTARY_STEP, KEY_WIDTH, COLUMNS,
            HEAD_DIM, PAIRS, BLOCK_T, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
        )  # fmt: skip
