"""RoPE and Eq. 4 of queries and keys as one Triton launch forward and one backward.

Notable:
- A program rotates a block of tokens for a few heads; heads are numbered through, queries first, then keys, so that one
  launch serves both. cos and sin are loaded once a program.
- A tile is `[BLOCK_T, BLOCK_PAIRS]`: all pairs of a head, real and imaginary parts apart. The gain g = 1 + alpha * S is
  loaded for the low-frequency columns only and is 1 elsewhere.
- For the signal's gradient, forward keeps a compact copy of the low-frequency pairs as they came in (exact in any
  dtype, a quarter of q and k at r_low = 0.25), and backward rotates it again.
- What changes from batch to batch (tokens, sequence length) is not specialized: no recompilation.

Names in the kernels: i_ index, o_ offsets, m_ mask, p_ pointers, b_ block of values;
t token, l position in the sequence, b batch, h head, d element of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
TILE_BYTES = 32 * NUM_WARPS * 16  # one 128-bit access a thread
MAX_BLOCK_T = 64  # of tiny heads: a thread keeps 64-bit offsets for its tokens
HEADS_PER_PROGRAM = 4


@triton.jit
def _row_pointers(x, i_b, i_l, i_h, stride_b, stride_h, stride_l):
    """Pointers to the first element of head i_h for every token of the block, `[BLOCK_T, 1]`, in 64 bits."""
    return x + (i_b * stride_b + i_l * stride_l + i_h.to(tl.int64) * stride_h)[:, None]


@triton.jit
def _load_pairs(
    p_row,
    stride_d,
    m_t,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Real and imaginary parts of all pairs, `[BLOCK_T, BLOCK_PAIRS]` each."""
    if INTERLEAVED:
        # One wide load and a split in registers: two gathers with stride 2 would be 16-bit accesses.
        o_d = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        b_x = tl.load(p_row + o_d * stride_d, mask=m_t[:, None] & (o_d < 2 * PAIRS), other=0.0)
        b_re, b_im = tl.split(tl.reshape(b_x, (m_t.shape[0], BLOCK_PAIRS, 2)))
    else:
        o_d = tl.arange(0, BLOCK_PAIRS)[None, :]
        m = m_t[:, None] & (o_d < PAIRS)
        b_re = tl.load(p_row + o_d * stride_d, mask=m, other=0.0)
        b_im = tl.load(p_row + (o_d + PAIRS) * stride_d, mask=m, other=0.0)
    return b_re.to(COMPUTE), b_im.to(COMPUTE)


@triton.jit
def _store_pairs(
    p_row, stride_d, b_re, b_im, m_t, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    dtype: tl.constexpr = p_row.dtype.element_ty
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        b_x = tl.reshape(tl.join(b_re.to(dtype), b_im.to(dtype)), (m_t.shape[0], 2 * BLOCK_PAIRS))
        tl.store(p_row + o_d * stride_d, b_x, mask=m_t[:, None] & (o_d < 2 * PAIRS))
    else:
        o_d = tl.arange(0, BLOCK_PAIRS)[None, :]
        m = m_t[:, None] & (o_d < PAIRS)
        tl.store(p_row + o_d * stride_d, b_re.to(dtype), mask=m)
        tl.store(p_row + (o_d + PAIRS) * stride_d, b_im.to(dtype), mask=m)


@triton.jit
def _copy_rest(
    p_from, from_stride_d, p_to, to_stride_d, m_t, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_REST: tl.constexpr
):
    """Partial rotary: the elements of the head beyond the pairs pass through."""
    if 2 * PAIRS < HEAD_DIM:
        o_d = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        m = m_t[:, None] & (o_d < HEAD_DIM)
        tl.store(p_to + o_d * to_stride_d, tl.load(p_from + o_d * from_stride_d, mask=m), mask=m)


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
def _rotary_rows(
    cos, sin, o_row, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
    PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """cos and sin of every token of the block, one column a pair, `[BLOCK_T, BLOCK_PAIRS]` each."""
    o_pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    m = m_t[:, None] & (o_pair < PAIRS)
    b_cos = tl.load(cos + o_row.to(tl.int64)[:, None] * cos_stride_row + o_pair * cos_stride_d, mask=m, other=0.0)
    b_sin = tl.load(sin + o_row.to(tl.int64)[:, None] * sin_stride_row + o_pair * sin_stride_d, mask=m, other=0.0)
    return b_cos.to(COMPUTE), b_sin.to(COMPUTE)


@triton.jit
def _forward_head(
    p_in, p_out, p_signal, p_low, b_cos, b_sin, m_t, in_stride_d, out_stride_d,
    ACTIVATE: tl.constexpr, STORE_LOW: tl.constexpr, ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, LOW_PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One head of the block: RoPE, then Eq. 4 as Z* = Z * g with g = 1 + alpha * S (1 where S has no column)."""
    b_re, b_im = _load_pairs(p_in, in_stride_d, m_t, PAIRS, INTERLEAVED, BLOCK_PAIRS, COMPUTE)
    b_s_re, b_s_im = _load_low(p_signal, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS, COMPUTE)
    if ACTIVATE:
        b_s_re *= tl.sigmoid(b_s_re)
        b_s_im *= tl.sigmoid(b_s_im)
    b_z_re = (b_re * b_cos - b_im * b_sin) * (1 + ALPHA * b_s_re)
    b_z_im = (b_im * b_cos + b_re * b_sin) * (1 + ALPHA * b_s_im)
    _store_pairs(p_out, out_stride_d, b_z_re, b_z_im, m_t, PAIRS, INTERLEAVED, BLOCK_PAIRS)
    _copy_rest(p_in, in_stride_d, p_out, out_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)
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
    cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d, signal_stride_t, key_signal_stride_t,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, SHARED: tl.constexpr, STORE_LOW: tl.constexpr,
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
    b_cos, b_sin = _rotary_rows(
        cos, sin, o_t % cos_rows, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
        PAIRS, BLOCK_PAIRS, COMPUTE,
    )  # fmt: skip
    o_t = o_t.to(tl.int64)
    for j in range(HEADS_PER_PROGRAM):
        i = i_group * HEADS_PER_PROGRAM + j
        p_low = low + (o_t * ((HEADS + KEY_HEADS) * D_LOW) + i * D_LOW)[:, None]
        if i < HEADS:
            _forward_head(
                _row_pointers(q, i_b, i_l, i, q_stride_b, q_stride_h, q_stride_l),
                _row_pointers(q_out, i_b, i_l, i, q_out_stride_b, q_out_stride_h, q_out_stride_l),
                signal + (o_t * signal_stride_t + i * D_LOW)[:, None],
                p_low, b_cos, b_sin, m_t, q_stride_d, q_out_stride_d,
                True, STORE_LOW, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
            )  # fmt: skip
        elif i < HEADS + KEY_HEADS:
            i_k = i - HEADS
            _forward_head(
                _row_pointers(k, i_b, i_l, i_k, k_stride_b, k_stride_h, k_stride_l),
                _row_pointers(k_out, i_b, i_l, i_k, k_out_stride_b, k_out_stride_h, k_out_stride_l),
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
    b_dy_re, b_dy_im = _load_pairs(p_dout, dout_stride_d, m_t, PAIRS, INTERLEAVED, BLOCK_PAIRS, COMPUTE)
    if NEED_DX:
        b_dz_re = b_dy_re * (1 + ALPHA * b_s_re)
        b_dz_im = b_dy_im * (1 + ALPHA * b_s_im)
        b_dx_re = b_dz_re * b_cos + b_dz_im * b_sin
        b_dx_im = b_dz_im * b_cos - b_dz_re * b_sin
        _store_pairs(p_dx, dx_stride_d, b_dx_re, b_dx_im, m_t, PAIRS, INTERLEAVED, BLOCK_PAIRS)
        _copy_rest(p_dout, dout_stride_d, p_dx, dx_stride_d, m_t, PAIRS, HEAD_DIM, BLOCK_REST)
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
    cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d, signal_stride_t, key_signal_stride_t,
    ALPHA: tl.constexpr, INTERLEAVED: tl.constexpr, SHARED: tl.constexpr,
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
    b_cos, b_sin = _rotary_rows(
        cos, sin, o_t % cos_rows, m_t, cos_stride_row, cos_stride_d, sin_stride_row, sin_stride_d,
        PAIRS, BLOCK_PAIRS, COMPUTE,
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
                _row_pointers(dq_out, i_b, i_l, i, dq_out_stride_b, dq_out_stride_h, dq_out_stride_l),
                _row_pointers(dq, i_b, i_l, i, dq_stride_b, dq_stride_h, dq_stride_l),
                p_low + i * D_LOW, b_s_re, b_s_im, b_cos, b_sin, m_t, dq_out_stride_d, dq_stride_d,
                NEED_DQ, NEED_DSIGNAL, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS, BLOCK_PAIRS, BLOCK_REST, COMPUTE,
            )  # fmt: skip
            if SHARED:
                b_dks_re, b_dks_im = _backward_head(
                    _row_pointers(dk_out, i_b, i_l, i, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l),
                    _row_pointers(dk, i_b, i_l, i, dk_stride_b, dk_stride_h, dk_stride_l),
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
                _row_pointers(dk_out, i_b, i_l, i_k, dk_out_stride_b, dk_out_stride_h, dk_out_stride_l),
                _row_pointers(dk, i_b, i_l, i_k, dk_stride_b, dk_stride_h, dk_stride_l),
                p_low + i * D_LOW, b_s_re, b_s_im, b_cos, b_sin, m_t, dk_out_stride_d, dk_stride_d,
                NEED_DK, NEED_DKEY_SIGNAL, ALPHA, INTERLEAVED, HEAD_DIM, PAIRS, LOW_PAIRS,
                BLOCK_PAIRS, BLOCK_REST, COMPUTE,
            )  # fmt: skip
            if NEED_DKEY_SIGNAL:
                p_ds = dkey_signal + (o_t * (KEY_HEADS * D_LOW) + i_k * D_LOW)[:, None]
                _store_low(p_ds, b_ds_re, b_ds_im, m_t, PAIRS, LOW_PAIRS, BLOCK_PAIRS)


class Launch(NamedTuple):
    """A kernel with all that its launch needs: what runs on a GPU, and what the offline compiler looks at."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    outputs: tuple[Tensor, ...]

    def run(self) -> tuple[Tensor, ...]:
        """Launch on the tensors' own device (not necessarily the current one) and return the outputs."""
        if self.programs:
            with torch.cuda.device_of(self.outputs[0]):
                self.kernel[(self.programs,)](**self.arguments, num_warps=NUM_WARPS)
        return self.outputs


def forward_launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, signal: Tensor, key_signal: Tensor | None,
    alpha: float, interleaved: bool, store_low: bool,
) -> Launch:  # fmt: skip
    """The forward launch; its outputs are q_out, k_out and the compact low-frequency pairs `[tokens, heads * d_low]`.

    cos and sin come with one column a pair, `[1 or b, l, R / 2]`; the other arguments as `rope_roae` has them.
    Without `store_low` the last output is empty.
    """
    shape = _shape_arguments(q, k, cos, sin, signal, key_signal, alpha, interleaved, units=q.shape[1] + k.shape[1])
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    low_columns = (q.shape[1] + k.shape[1]) * 2 * shape["LOW_PAIRS"] if store_low else 0
    low = q.new_empty(shape["tokens"], low_columns)
    arguments = dict(q=q, k=k, q_out=q_out, k_out=k_out, low=low, STORE_LOW=store_low, **shape)
    for name in ("q", "k", "q_out", "k_out"):
        arguments |= _strides(name, arguments[name])
    return Launch(
        rope_roae_forward_kernel, _programs(arguments, q.shape[1] + k.shape[1]), arguments, (q_out, k_out, low)
    )


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
    shape = _shape_arguments(dq_out, dk_out, cos, sin, signal, key_signal, alpha, interleaved, units)
    dq = _empty_heads(dq_out, sequence_major) if need_dq else dq_out.new_empty(0)
    dk = _empty_heads(dk_out, sequence_major) if need_dk else dk_out.new_empty(0)
    dsignal = signal.new_empty(signal.shape if need_dsignal else 0)
    dkey_signal = (signal if shared else key_signal).new_empty(key_signal.shape if need_dkey_signal else 0)
    arguments = dict(
        dq_out=dq_out, dk_out=dk_out, low=low, dq=dq, dk=dk, dsignal=dsignal, dkey_signal=dkey_signal,
        NEED_DQ=need_dq, NEED_DK=need_dk, NEED_DSIGNAL=need_dsignal, NEED_DKEY_SIGNAL=need_dkey_signal, **shape,
    )  # fmt: skip
    for name in ("dq_out", "dk_out", "dq", "dk"):
        arguments |= _strides(name, arguments[name])
    return Launch(rope_roae_backward_kernel, _programs(arguments, units), arguments, (dq, dk, dsignal, dkey_signal))


def _shape_arguments(q, k, cos, sin, signal, key_signal, alpha: float, interleaved: bool, units: int) -> dict[str, Any]:
    """The arguments that both kernels share; q and k may be gradients of the outputs."""
    batch, heads, seq, head_dim = q.shape
    pairs = cos.shape[-1]
    cos, sin, signal = _rows(cos), _rows(sin), _signal_rows(signal)
    shared = key_signal is None
    key_signal = signal if shared else _signal_rows(key_signal)
    block_pairs = triton.next_power_of_2(pairs)
    block_rest = triton.next_power_of_2(max(1, head_dim - 2 * pairs))
    block_t = TILE_BYTES // q.element_size() // max(block_pairs, block_rest)
    return dict(
        cos=cos, sin=sin, signal=signal, key_signal=key_signal,
        tokens=batch * seq, seq=seq, cos_rows=cos.shape[0],
        cos_stride_row=cos.stride(0), cos_stride_d=cos.stride(1),
        sin_stride_row=sin.stride(0), sin_stride_d=sin.stride(1),
        signal_stride_t=signal.stride(0), key_signal_stride_t=key_signal.stride(0),
        ALPHA=alpha, INTERLEAVED=interleaved, SHARED=shared,
        HEADS=heads, KEY_HEADS=k.shape[1], HEAD_DIM=head_dim, PAIRS=pairs, LOW_PAIRS=signal.shape[1] // heads // 2,
        HEADS_PER_PROGRAM=min(HEADS_PER_PROGRAM, units),
        BLOCK_T=min(max(1, block_t), MAX_BLOCK_T), BLOCK_PAIRS=block_pairs, BLOCK_REST=block_rest,
        COMPUTE=tl.float64 if q.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


def _programs(arguments: dict[str, Any], units: int) -> int:
    return triton.cdiv(arguments["tokens"], arguments["BLOCK_T"]) * triton.cdiv(units, arguments["HEADS_PER_PROGRAM"])


def _rows(t: Tensor) -> Tensor:
    """`[batch, seq, width]` as `[batch * seq, width]`, a view wherever batch and sequence lie one behind the other."""
    if t.shape[0] == 1:
        return t[0]  # keeps the stride even of a single row, which reshape would set anew
    return t.reshape(-1, t.shape[-1])


def _signal_rows(t: Tensor) -> Tensor:
    """`_rows` with columns side by side, as the kernels read a signal; a projection's output needs no copy for that."""
    rows = _rows(t)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _strides(name: str, t: Tensor) -> dict[str, int]:
    """A tensor's strides by the kernels' argument names; a batch of one, or no tensor at all, is never stepped over."""
    b, h, l, d = t.stride() if t.dim() == 4 else (0, 0, 0, 1)  # noqa: E741
    return {
        f"{name}_stride_b": 0 if t.shape[0] == 1 else b,
        f"{name}_stride_h": h,
        f"{name}_stride_l": l,
        f"{name}_stride_d": d,
    }


def _empty_heads(like: Tensor, sequence_major: bool) -> Tensor:
    batch, heads, seq, head_dim = like.shape
    if sequence_major:
        return like.new_empty(batch, seq, heads, head_dim).transpose(1, 2)
    return like.new_empty(batch, heads, seq, head_dim)


# The launches as operators of torch: opaque to torch.compile, one graph whatever the mode, the shapes known on the meta
# device. Plain `define` and `impl`: the decorator `custom_op` takes four times as long a call.
torch.library.define(
    "rosa::rope_roae_forward",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor signal, Tensor? key_signal, "
    "float alpha, bool interleaved, bool store_low) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "rosa::rope_roae_backward",
    "(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, Tensor signal, Tensor? key_signal, Tensor low, "
    "float alpha, bool interleaved, bool sequence_major, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for _name, _launch in (("rosa::rope_roae_forward", forward_launch), ("rosa::rope_roae_backward", backward_launch)):
    torch.library.impl(_name, "default", lambda *arguments, launch=_launch: launch(*arguments).run())
    torch.library.register_fake(_name, lambda *arguments, launch=_launch: launch(*arguments).outputs)


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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "rope_roae's Triton backend has no double backward, and this backward was asked for a graph "
                "(create_graph=True); use backend='reference' (or ROSA_BACKEND=reference), which has one"
            )
        arguments = (dq_out, dk_out, *ctx.saved_tensors, ctx.alpha, ctx.interleaved, ctx.sequence_major, ctx.needs)
        grads = torch.ops.rosa.rope_roae_backward(*arguments)
        dq, dk, dsignal, dkey_signal = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
        return dq, dk, None, None, dsignal, dkey_signal, None, None


def rope_roae_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, signal: Tensor, key_signal: Tensor | None,
    alpha: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rosa_kernels.rope_roae` on the Triton backend, its arguments checked, cos and sin with one column a pair."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, signal, key_signal)):
        return _RopeRoae.apply(q, k, cos, sin, signal, key_signal, alpha, interleaved)
    return torch.ops.rosa.rope_roae_forward(q, k, cos, sin, signal, key_signal, alpha, interleaved, False)[:2]
