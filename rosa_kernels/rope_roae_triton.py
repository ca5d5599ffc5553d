"""RoPE and Eq. 4 of queries and keys on the Triton backend: the launches, their operators and the autograd function.

The kernels are in `rope_roae_kernels.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from rosa_kernels.checks import low_size
from rosa_kernels.launch import (
    Launch,
    cdiv,
    empty_heads,
    heads_argument,
    next_power_of_2,
    refuse_double_backward,
    refuse_forward_mode,
    register,
    rotary_argument,
    rows,
)
from rosa_kernels.rope_roae_kernels import Shape, rope_roae_backward_kernel, rope_roae_forward_kernel

NUM_WARPS = 4
TILE_BYTES = 32 * NUM_WARPS * 16  # one 128-bit access a thread
MAX_BLOCK_T = 64  # of tiny heads: a thread keeps 64-bit offsets for its tokens
HEADS_PER_PROGRAM = 4


def forward_launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, signal: Tensor, key_signal: Tensor | None,
    alpha: float, interleaved: bool, store_low: bool,
) -> Launch:  # fmt: skip
    """The forward launch; its outputs are q_out, k_out and the compact low-frequency pairs `[tokens, heads * d_low]`.

    cos and sin come with one column a pair, `[1 or b, l, R / 2]`; the other arguments as `rope_roae` has them.
    Without `store_low` the last output is empty.
    """
    units = q.shape[1] + k.shape[1]
    arguments, shape = _arguments(q, k, cos, sin, signal, key_signal, alpha, interleaved, units)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    low = q.new_empty(arguments["tokens"], units * 2 * shape.LOW_PAIRS.value if store_low else 0)
    arguments |= {name: heads_argument(t) for name, t in dict(q=q, k=k, q_out=q_out, k_out=k_out).items()}
    arguments |= dict(low=low, STORE_LOW=store_low)
    return Launch(rope_roae_forward_kernel, _programs(arguments, units), NUM_WARPS, arguments, (q_out, k_out, low))


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
    arguments, _ = _arguments(dq_out, dk_out, cos, sin, signal, key_signal, alpha, interleaved, units)
    dq = empty_heads(dq_out, sequence_major) if need_dq else dq_out.new_empty(0)
    dk = empty_heads(dk_out, sequence_major) if need_dk else dk_out.new_empty(0)
    dsignal = signal.new_empty(signal.shape if need_dsignal else 0)
    dkey_signal = (signal if shared else key_signal).new_empty(key_signal.shape if need_dkey_signal else 0)
    heads = dict(dq_out=dq_out, dk_out=dk_out, dq=dq, dk=dk)
    arguments |= {name: heads_argument(t) for name, t in heads.items()}
    arguments |= dict(
        low=low, dsignal=dsignal, dkey_signal=dkey_signal,
        NEED_DQ=need_dq, NEED_DK=need_dk, NEED_DSIGNAL=need_dsignal, NEED_DKEY_SIGNAL=need_dkey_signal,
    )  # fmt: skip
    outputs = (dq, dk, dsignal, dkey_signal)
    return Launch(rope_roae_backward_kernel, _programs(arguments, units), NUM_WARPS, arguments, outputs)


def _arguments(
    q, k, cos, sin, signal, key_signal, alpha: float, interleaved: bool, units: int
) -> tuple[dict[str, Any], Shape]:
    """The arguments that both kernels share, and the constants among them; q and k may be gradients of the outputs."""
    signal = _signal_rows(signal)
    shared = key_signal is None
    key_signal = signal if shared else _signal_rows(key_signal)
    low_pairs = low_size(q.shape[1], signal, k.shape[1], key_signal) // 2
    rotary = rotary_argument(cos, sin)
    batch, heads, seq, head_dim = q.shape
    pairs = rotary.cos.shape[1]
    block_pairs = next_power_of_2(pairs)
    block_rest = next_power_of_2(max(1, head_dim - 2 * pairs))
    shape = Shape(*map(tl.constexpr, Shape(
        HEADS=heads, KEY_HEADS=k.shape[1], HEAD_DIM=head_dim, PAIRS=pairs, LOW_PAIRS=low_pairs,
        INTERLEAVED=interleaved, ROTARY_STEP=rotary.cos.stride(1), HEADS_PER_PROGRAM=min(HEADS_PER_PROGRAM, units),
        BLOCK_T=min(max(1, TILE_BYTES // q.element_size() // max(block_pairs, block_rest)), MAX_BLOCK_T),
        BLOCK_PAIRS=block_pairs, BLOCK_REST=block_rest,
        COMPUTE=tl.float64 if q.dtype == torch.float64 else tl.float32,
    )))  # fmt: skip
    arguments = dict(
        rotary=rotary, signal=signal, key_signal=key_signal,
        signal_stride_t=signal.stride(0), key_signal_stride_t=key_signal.stride(0),
        alpha=alpha, tokens=batch * seq, seq=seq, cos_rows=rotary.cos.shape[0], SHARED=shared, shape=shape,
    )  # fmt: skip
    return arguments, shape


def _programs(arguments: dict[str, Any], units: int) -> int:
    shape = arguments["shape"]
    blocks = cdiv(arguments["tokens"], shape.BLOCK_T.value)
    return blocks * cdiv(units, shape.HEADS_PER_PROGRAM.value)


def _signal_rows(t: Tensor) -> Tensor:
    """`rows` with columns side by side, as the kernels read a signal; a projection's output needs no copy for that."""
    t = rows(t)
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
    refuse_forward_mode("rope_roae", q, k, cos, sin, signal, key_signal)
    if torch.is_grad_enabled():
        return _RopeRoae.apply(q, k, cos, sin, signal, key_signal, alpha, interleaved)
    return torch.ops.rosa.rope_roae_forward(q, k, cos, sin, signal, key_signal, alpha, interleaved, False)[:2]
