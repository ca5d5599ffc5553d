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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from rosa_kernels.heads import copy_rest, head_rows, load_pairs, load_rotary, rotate, rotate_back, store_pairs
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


class Shape(NamedTuple):
    """What a binary is made for. The parts of a head: its PAIRS, all of them or (NEIGHBOURS) in two halves, and the
    REST of it, in neighbours."""

    HEADS: Any
    KEY_HEADS: Any
    HEAD_DIM: Any
    PAIRS: Any
    VARIANT: Any
    NEIGHBOURS: Any
    INTERLEAVED: Any
    ROTARY_STEP: Any
    BLOCK_T: Any
    BLOCK_PAIRS: Any
    BLOCK_REST: Any
    COMPUTE: Any


class Weights(NamedTuple):
    """theta and alpha of one adapter, for an output of WIDTH."""

    theta: Any
    alpha: Any
    WIDTH: Any


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
    w, i_h, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, shape
):  # fmt: skip
    o_p, o_1, o_2 = _pairs_of_head(i_h, FIRST, STEP, shape.HEAD_DIM, BLOCK)
    m = tl.arange(0, BLOCK)[None, :] < COUNT
    return load_weights(w.theta, w.alpha, o_p, o_1, o_2, m, w.WIDTH, shape.VARIANT, shape.COMPUTE)


@triton.jit
def _store_sums(
    sums, b_sums, i_h, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, shape,
):  # fmt: skip
    o_p, o_1, o_2 = _pairs_of_head(i_h, FIRST, STEP, shape.HEAD_DIM, BLOCK)
    m = tl.arange(0, BLOCK)[None, :] < COUNT
    store_sums(sums, b_sums, o_p, o_1, o_2, m, COLUMNS, shape.VARIANT)


@triton.jit
def _load(
    p_row, stride_d, m_t, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, NEIGHBOURS: tl.constexpr, shape
):
    b_1, b_2 = load_pairs(p_row, stride_d, m_t, FIRST, COUNT, BLOCK, shape.PAIRS, NEIGHBOURS)
    return b_1.to(shape.COMPUTE), b_2.to(shape.COMPUTE)


@triton.jit
def _split(b_x):
    """Neighbouring columns apart."""
    return tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1] // 2, 2)))


@triton.jit
def _join(b_pair):
    """The inverse of `_split`."""
    return tl.reshape(tl.join(b_pair[0], b_pair[1]), (b_pair[0].shape[0], 2 * b_pair[0].shape[1]))


@triton.jit
def _forward_head(x, out, rotary, w, i_h, i_s, i_first, span, seq, steps, cos_rows, ADAPT: tl.constexpr, shape):
    PAIRS: tl.constexpr = shape.PAIRS
    HALF: tl.constexpr = PAIRS // 2
    BLOCK: tl.constexpr = shape.BLOCK_PAIRS
    REST: tl.constexpr = shape.HEAD_DIM // 2 - PAIRS  # pairs
    BLOCK_REST: tl.constexpr = shape.BLOCK_REST // 2
    if ADAPT:
        if shape.NEIGHBOURS:
            b_w = _load_weights(w, i_h, 0, HALF, 1, BLOCK // 2, shape)
            b_w_im = _load_weights(w, i_h, HALF, HALF, 1, BLOCK // 2, shape)
        else:
            b_w = _load_weights(w, i_h, 0, PAIRS, 1 if shape.INTERLEAVED else PAIRS, BLOCK, shape)
        if REST > 0:
            b_w_rest = _load_weights(w, i_h, PAIRS, REST, 1, BLOCK_REST, shape)
    for j in range(steps):
        t = block_of_tokens(i_s, i_first + j * shape.BLOCK_T, span, seq, cos_rows, shape.BLOCK_T)
        b_cos, b_sin = load_rotary(rotary, t, 0, PAIRS, BLOCK, shape)
        p_x, p_out = head_rows(x, i_h, t), head_rows(out, i_h, t)
        if shape.NEIGHBOURS and ADAPT:
            b_1, b_2 = _load(p_x, x.d, t.m, 0, HALF, BLOCK // 2, True, shape)
            b_re = _join(turn(b_1, b_2, b_w))
            b_1, b_2 = _load(p_x + PAIRS * x.d, x.d, t.m, 0, HALF, BLOCK // 2, True, shape)
            b_im = _join(turn(b_1, b_2, b_w_im))
        else:
            b_re, b_im = _load(p_x, x.d, t.m, 0, PAIRS, BLOCK, shape.INTERLEAVED, shape)
            if ADAPT:
                b_re, b_im = turn(b_re, b_im, b_w)
        b_re, b_im = rotate(b_re, b_im, b_cos, b_sin, shape)
        store_pairs(p_out, out.d, b_re, b_im, t.m, 0, PAIRS, BLOCK, PAIRS, shape.INTERLEAVED)
        if ADAPT and REST > 0:
            b_1, b_2 = _load(p_x, x.d, t.m, PAIRS, REST, BLOCK_REST, True, shape)
            b_1, b_2 = turn(b_1, b_2, b_w_rest)
            store_pairs(p_out, out.d, b_1, b_2, t.m, PAIRS, REST, BLOCK_REST, PAIRS, True)
        elif not ADAPT:
            copy_rest(p_x, x.d, p_out, out.d, t.m, shape)


@triton.jit(do_not_specialize=["tokens", "seq", "splits", "steps", "cos_rows"])
def rope_road_forward_kernel(
    q, k, q_out, k_out, rotary, theta, alpha, key_theta, key_alpha, index, tokens, seq, splits, steps, cos_rows,
    ADAPT_Q: tl.constexpr, ADAPT_K: tl.constexpr, INDEXED: tl.constexpr, shape,
):  # fmt: skip
    WIDTH: tl.constexpr = shape.HEADS * shape.HEAD_DIM
    KEY_WIDTH: tl.constexpr = shape.KEY_HEADS * shape.HEAD_DIM
    i_h, i_t = tl.program_id(0) % (shape.HEADS + shape.KEY_HEADS), tl.program_id(0) // (shape.HEADS + shape.KEY_HEADS)
    span = seq if INDEXED else tokens
    i_s, i_first = split_tokens(i_t, splits, steps, shape.BLOCK_T)
    i_a = adapter_of(index, i_s, INDEXED)
    if i_h < shape.HEADS:
        o_a = i_a * (WIDTH * shape.VARIANT // 2)
        w = Weights(theta + o_a, alpha + o_a, WIDTH)
        _forward_head(q, q_out, rotary, w, i_h, i_s, i_first, span, seq, steps, cos_rows, ADAPT_Q, shape)
    else:
        o_a = i_a * (KEY_WIDTH * shape.VARIANT // 2)
        w_k = Weights(key_theta + o_a, key_alpha + o_a, KEY_WIDTH)  # of its own name: its dtypes may differ from w's
        i_k = i_h - shape.HEADS
        _forward_head(k, k_out, rotary, w_k, i_k, i_s, i_first, span, seq, steps, cos_rows, ADAPT_K, shape)


@triton.jit
def _backward_head(
    dout, kept, dx, rotary, w, sums, i_h, i_s, i_first, span, seq, steps, cos_rows,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, ADAPT: tl.constexpr, COLUMNS: tl.constexpr, shape,
):  # fmt: skip
    PAIRS: tl.constexpr = shape.PAIRS
    HALF: tl.constexpr = PAIRS // 2
    BLOCK: tl.constexpr = shape.BLOCK_PAIRS
    STEP: tl.constexpr = 1 if shape.INTERLEAVED else PAIRS
    REST: tl.constexpr = shape.HEAD_DIM // 2 - PAIRS  # pairs
    BLOCK_REST: tl.constexpr = shape.BLOCK_REST // 2
    VARIANT: tl.constexpr = shape.VARIANT
    if ADAPT and NEED_DX:
        if shape.NEIGHBOURS:
            b_w = _load_weights(w, i_h, 0, HALF, 1, BLOCK // 2, shape)
            b_w_im = _load_weights(w, i_h, HALF, HALF, 1, BLOCK // 2, shape)
        else:
            b_w = _load_weights(w, i_h, 0, PAIRS, STEP, BLOCK, shape)
        if REST > 0:
            b_w_rest = _load_weights(w, i_h, PAIRS, REST, 1, BLOCK_REST, shape)
    if shape.NEIGHBOURS:
        b_sums = no_sums(shape.BLOCK_T, BLOCK // 2, VARIANT, shape.COMPUTE)
        b_sums_im = no_sums(shape.BLOCK_T, BLOCK // 2, VARIANT, shape.COMPUTE)
    else:
        b_sums = no_sums(shape.BLOCK_T, BLOCK, VARIANT, shape.COMPUTE)
    if REST > 0:
        b_sums_rest = no_sums(shape.BLOCK_T, BLOCK_REST, VARIANT, shape.COMPUTE)
    for j in range(steps):
        t = block_of_tokens(i_s, i_first + j * shape.BLOCK_T, span, seq, cos_rows, shape.BLOCK_T)
        b_cos, b_sin = load_rotary(rotary, t, 0, PAIRS, BLOCK, shape)
        p_dout, p_kept, p_dx = head_rows(dout, i_h, t), head_rows(kept, i_h, t), head_rows(dx, i_h, t)
        b_dy_re, b_dy_im = _load(p_dout, dout.d, t.m, 0, PAIRS, BLOCK, shape.INTERLEAVED, shape)
        b_re, b_im = rotate_back(b_dy_re, b_dy_im, b_cos, b_sin, shape)  # du = R^T dy
        if shape.NEIGHBOURS and ADAPT:
            b_d1, b_d2 = _split(b_re)
            b_d3, b_d4 = _split(b_im)
            if NEED_SUMS:
                if VARIANT == 1:
                    b_y_re, b_y_im = _load(p_kept, kept.d, t.m, 0, PAIRS, BLOCK, False, shape)
                    b_u_re, b_u_im = rotate_back(b_y_re, b_y_im, b_cos, b_sin, shape)
                    b_norm = b_cos.to(shape.COMPUTE) * b_cos.to(shape.COMPUTE)
                    b_norm += b_sin.to(shape.COMPUTE) * b_sin.to(shape.COMPUTE)
                    b_norm = tl.where(b_norm == 0, 0.0, 1 / tl.where(b_norm == 0, 1.0, b_norm))
                    b_1, b_2 = _split(b_u_re * b_norm)
                    b_3, b_4 = _split(b_u_im * b_norm)
                else:
                    b_1, b_2 = _load(p_kept, kept.d, t.m, 0, HALF, BLOCK // 2, True, shape)
                    b_3, b_4 = _load(p_kept + PAIRS * kept.d, kept.d, t.m, 0, HALF, BLOCK // 2, True, shape)
                b_sums = add_products(b_sums, b_d1, b_d2, b_1, b_2, VARIANT)
                b_sums_im = add_products(b_sums_im, b_d3, b_d4, b_3, b_4, VARIANT)
            if NEED_DX:
                b_re, b_im = _join(turn_back(b_d1, b_d2, b_w)), _join(turn_back(b_d3, b_d4, b_w_im))
        elif ADAPT:
            if NEED_SUMS:
                b_1, b_2 = _load(p_kept, kept.d, t.m, 0, PAIRS, BLOCK, shape.INTERLEAVED, shape)
                if VARIANT == 1:
                    b_sums = add_products(b_sums, b_dy_re, b_dy_im, b_1, b_2, VARIANT)
                else:
                    b_sums = add_products(b_sums, b_re, b_im, b_1, b_2, VARIANT)
            if NEED_DX:
                b_re, b_im = turn_back(b_re, b_im, b_w)
        if NEED_DX:
            store_pairs(p_dx, dx.d, b_re, b_im, t.m, 0, PAIRS, BLOCK, PAIRS, shape.INTERLEAVED)
        if ADAPT and REST > 0:
            b_d1, b_d2 = _load(p_dout, dout.d, t.m, PAIRS, REST, BLOCK_REST, True, shape)
            if NEED_SUMS:
                b_1, b_2 = _load(p_kept, kept.d, t.m, PAIRS, REST, BLOCK_REST, True, shape)
                b_sums_rest = add_products(b_sums_rest, b_d1, b_d2, b_1, b_2, VARIANT)
            if NEED_DX:
                b_d1, b_d2 = turn_back(b_d1, b_d2, b_w_rest)
                store_pairs(p_dx, dx.d, b_d1, b_d2, t.m, PAIRS, REST, BLOCK_REST, PAIRS, True)
        elif NEED_DX:
            copy_rest(p_dout, dout.d, p_dx, dx.d, t.m, shape)
    if NEED_SUMS:
        if shape.NEIGHBOURS:
            _store_sums(sums, b_sums, i_h, 0, HALF, 1, BLOCK // 2, COLUMNS, shape)
            _store_sums(sums, b_sums_im, i_h, HALF, HALF, 1, BLOCK // 2, COLUMNS, shape)
        else:
            _store_sums(sums, b_sums, i_h, 0, PAIRS, STEP, BLOCK, COLUMNS, shape)
        if REST > 0:
            _store_sums(sums, b_sums_rest, i_h, PAIRS, REST, 1, BLOCK_REST, COLUMNS, shape)


@triton.jit(do_not_specialize=["tokens", "seq", "splits", "steps", "cos_rows"])
def rope_road_backward_kernel(
    dq_out, dk_out, q_kept, k_kept, dq, dk, rotary, theta, alpha, key_theta, key_alpha, index, sums,
    tokens, seq, splits, steps, cos_rows,
    ADAPT_Q: tl.constexpr, ADAPT_K: tl.constexpr, INDEXED: tl.constexpr, NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr,
    NEED_SUMS: tl.constexpr, NEED_KEY_SUMS: tl.constexpr, shape,
):  # fmt: skip
    """dq and dk, and a row of sums for the tokens of a program: the columns of the queries, then those of the keys."""
    WIDTH: tl.constexpr = shape.HEADS * shape.HEAD_DIM
    KEY_WIDTH: tl.constexpr = shape.KEY_HEADS * shape.HEAD_DIM
    QUERY_COLUMNS: tl.constexpr = (WIDTH // 2 if shape.VARIANT == 1 else WIDTH) if NEED_SUMS else 0
    KEY_COLUMNS: tl.constexpr = (KEY_WIDTH // 2 if shape.VARIANT == 1 else KEY_WIDTH) if NEED_KEY_SUMS else 0
    COLUMNS: tl.constexpr = QUERY_COLUMNS + KEY_COLUMNS
    i_h, i_t = tl.program_id(0) % (shape.HEADS + shape.KEY_HEADS), tl.program_id(0) // (shape.HEADS + shape.KEY_HEADS)
    span = seq if INDEXED else tokens
    i_s, i_first = split_tokens(i_t, splits, steps, shape.BLOCK_T)
    i_a = adapter_of(index, i_s, INDEXED)
    p_sums = sums + i_t.to(tl.int64) * (2 * COLUMNS)
    if i_h < shape.HEADS:
        o_a = i_a * (WIDTH * shape.VARIANT // 2)
        w = Weights(theta + o_a, alpha + o_a, WIDTH)
        _backward_head(
            dq_out, q_kept, dq, rotary, w, p_sums, i_h, i_s, i_first, span, seq, steps, cos_rows,
            NEED_DQ, NEED_SUMS, ADAPT_Q, COLUMNS, shape,
        )  # fmt: skip
    else:
        o_a = i_a * (KEY_WIDTH * shape.VARIANT // 2)
        w_k = Weights(key_theta + o_a, key_alpha + o_a, KEY_WIDTH)
        _backward_head(
            dk_out, k_kept, dk, rotary, w_k, p_sums + QUERY_COLUMNS, i_h - shape.HEADS, i_s, i_first, span, seq, steps,
            cos_rows, NEED_DK, NEED_KEY_SUMS, ADAPT_K, COLUMNS, shape,
        )  # fmt: skip
