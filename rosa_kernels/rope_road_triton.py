"""RoAd of queries and keys, then RoPE, on the Triton backend: the launches, their operators and the autograd function.

The kernels are in `rope_road_kernels.py`; the sums' second launch is the one of `road_triton.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from rosa_kernels.launch import (
    Launch,
    empty_heads,
    heads_argument,
    next_power_of_2,
    refuse_double_backward,
    refuse_forward_mode,
    register,
    rotary_argument,
)
from rosa_kernels.road_triton import (
    MAX_BLOCK_T,
    NUM_WARPS,
    TILE_BYTES,
    columns_of_sums,
    divide_tokens,
    empty_sums,
)
from rosa_kernels.rope_road_kernels import Shape, rope_road_backward_kernel, rope_road_forward_kernel

Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # theta, alpha, key_theta, key_alpha


def forward_launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None,
    theta: Tensor | None, alpha: Tensor | None, key_theta: Tensor | None, key_alpha: Tensor | None,
    variant: int, neighbours: bool, interleaved: bool,
) -> Launch:  # fmt: skip
    """The forward launch; its outputs are q_out and k_out.

    cos and sin come with one column a pair, `[1 or b, l, R / 2]`. theta and alpha, or the keys', may be None: then
    these are only rotated. RoAd's pairs are the rotary pairs or, in the half layout, `neighbours`; the elements beyond
    the rotary part are neighbours. The other arguments are as `rope_road` has them.
    """
    weights = (theta, alpha, key_theta, key_alpha)
    arguments, programs, _ = _arguments(q, k, cos, sin, index, weights, variant, neighbours, interleaved)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    heads = dict(q=q, k=k, q_out=q_out, k_out=k_out)
    arguments |= {name: heads_argument(t) for name, t in heads.items()}
    return Launch(rope_road_forward_kernel, programs, NUM_WARPS, arguments, (q_out, k_out))


def backward_launch(
    dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None,
    theta: Tensor | None, alpha: Tensor | None, key_theta: Tensor | None, key_alpha: Tensor | None,
    q_kept: Tensor | None, k_kept: Tensor | None, variant: int, neighbours: bool, interleaved: bool,
    sequence_major: bool, need_dq: bool, need_dk: bool,
) -> Launch:  # fmt: skip
    """The backward launch over tokens; its outputs are dq and dk, empty where they are not asked for, and the partial
    sums `[2 * rows, columns]` from which `road_triton.reduce_launch` makes the gradients of angles and scales.

    `q_kept` and `k_kept` are forward's outputs for variant 1 and its inputs for the others; what is None has no columns
    of sums. `sequence_major` lays dq and dk out as `[b, l, h, d]`, as Hugging Face's projections have it.
    """
    weights = (theta, alpha, key_theta, key_alpha)
    arguments, programs, rows = _arguments(dq_out, dk_out, cos, sin, index, weights, variant, neighbours, interleaved)
    need_sums, need_key_sums = q_kept is not None, k_kept is not None
    dq = empty_heads(dq_out, sequence_major) if need_dq else dq_out.new_empty(0)
    dk = empty_heads(dk_out, sequence_major) if need_dk else dk_out.new_empty(0)
    columns = need_sums * columns_of_sums(theta, variant) + need_key_sums * columns_of_sums(key_theta, variant)
    sums = empty_sums(dq_out, rows if columns else 0, columns)
    q_kept, k_kept = dq_out if q_kept is None else q_kept, dk_out if k_kept is None else k_kept
    heads = dict(dq_out=dq_out, dk_out=dk_out, q_kept=q_kept, k_kept=k_kept, dq=dq, dk=dk)
    arguments |= {name: heads_argument(t) for name, t in heads.items()}
    arguments |= dict(sums=sums, NEED_DQ=need_dq, NEED_DK=need_dk, NEED_SUMS=need_sums, NEED_KEY_SUMS=need_key_sums)
    return Launch(rope_road_backward_kernel, programs, NUM_WARPS, arguments, (dq, dk, sums))


def _arguments(
    q, k, cos, sin, index, weights: Weights, variant: int, neighbours: bool, interleaved: bool
) -> tuple[dict[str, Any], int, int]:
    """The arguments that both kernels share, their programs, and rows of sums; q and k may be gradients."""
    rotary = rotary_argument(cos, sin)
    batch, heads, seq, head_dim = q.shape
    pairs = rotary.cos.shape[1]
    block_pairs = next_power_of_2(pairs)
    block_rest = next_power_of_2(max(1, head_dim - 2 * pairs))
    # Constants of the graph, even where torch.compile takes every size for dynamic.
    widest, all_heads = int(max(block_pairs, block_rest)), int(heads + k.shape[1])
    block_t = min(max(1, TILE_BYTES // q.element_size() // widest), MAX_BLOCK_T)
    division, rows = divide_tokens(batch, seq, index, block_t, all_heads)
    shape = Shape(*map(tl.constexpr, Shape(
        HEADS=heads, KEY_HEADS=k.shape[1], HEAD_DIM=head_dim, PAIRS=pairs, VARIANT=variant, NEIGHBOURS=neighbours,
        INTERLEAVED=interleaved, ROTARY_STEP=rotary.cos.stride(1),
        BLOCK_T=division.pop("BLOCK_T"), BLOCK_PAIRS=block_pairs, BLOCK_REST=block_rest,
        COMPUTE=tl.float64 if q.dtype == torch.float64 else tl.float32,
    )))  # fmt: skip
    names = ("theta", "alpha", "key_theta", "key_alpha")
    arguments = {name: q if w is None else w.contiguous() for name, w in zip(names, weights, strict=True)}
    arguments |= division | dict(
        rotary=rotary, index=q if index is None else index, seq=seq, cos_rows=rotary.cos.shape[0],
        ADAPT_Q=weights[0] is not None, ADAPT_K=weights[2] is not None, shape=shape,
    )  # fmt: skip
    return arguments, rows * all_heads, rows


register(
    "rope_road_forward",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? index, Tensor? theta, Tensor? alpha, Tensor? key_theta, "
    "Tensor? key_alpha, int variant, bool neighbours, bool interleaved) -> (Tensor, Tensor)",
    forward_launch,
)
register(
    "rope_road_backward",
    "(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, Tensor? index, Tensor? theta, Tensor? alpha, "
    "Tensor? key_theta, Tensor? key_alpha, Tensor? q_kept, Tensor? k_kept, int variant, bool neighbours, "
    "bool interleaved, bool sequence_major, bool need_dq, bool need_dk) -> (Tensor, Tensor, Tensor)",
    backward_launch,
)


class _RopeRoad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, index, theta, alpha, key_theta, key_alpha, *options):
        tensors = (cos, sin, index, theta, alpha, key_theta, key_alpha)
        q_out, k_out = torch.ops.rosa.rope_road_forward(q, k, *tensors, *options)
        needs_q, needs_k, *_ = ctx.needs_input_grad
        needs = ctx.needs_input_grad[5:9]  # of theta, alpha, key_theta, key_alpha
        kept = (q_out, k_out) if options[0] == 1 else (q, k)
        kept = (t if any(need) else None for t, need in zip(kept, (needs[:2], needs[2:]), strict=True))
        ctx.save_for_backward(*tensors, *kept)
        ctx.sequence_major = q.stride(1) <= q.stride(2)
        ctx.options, ctx.needs_heads, ctx.needs = options, (needs_q, needs_k), needs
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        refuse_double_backward("rope_road")
        tensors = ctx.saved_tensors
        dq, dk, sums = torch.ops.rosa.rope_road_backward(
            dq_out, dk_out, *tensors, *ctx.options, ctx.sequence_major, *ctx.needs_heads
        )
        grads = [None] * 4
        if any(ctx.needs):
            index, theta, alpha, key_theta, key_alpha = tensors[2:7]
            query = (theta, alpha) if any(ctx.needs[:2]) else (None, None)
            key = (key_theta, key_alpha) if any(ctx.needs[2:]) else (None, None)
            grads = torch.ops.rosa.road_reduce(sums, index, *query, *key, ctx.options[0], list(ctx.needs))
        needs = (*ctx.needs_heads, *ctx.needs)
        dq, dk, *grads = (g if need else None for g, need in zip((dq, dk, *grads), needs, strict=True))
        return dq, dk, None, None, None, *grads, *[None] * len(ctx.options)


def rope_road_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None, weights: Weights,
    variant: int, neighbours: bool, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rosa_kernels.rope_road` in one launch, its arguments checked, cos and sin with one column a pair."""
    arguments = (q, k, cos, sin, index, *weights, variant, neighbours, interleaved)
    refuse_forward_mode("rope_road", *arguments)
    if torch.is_grad_enabled():
        return _RopeRoad.apply(*arguments)
    return torch.ops.rosa.rope_road_forward(*arguments)
