"""RoAd of a linear layer's output on the Triton backend: the launches, their operators and the autograd function.

The kernels are in `road_kernels.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from rosa_kernels.kept import run_launch
from rosa_kernels.launch import (
    Launch,
    cdiv,
    heads_argument,
    next_power_of_2,
    refuse_double_backward,
    refuse_forward_mode,
    register,
)
from rosa_kernels.reference import compute_dtype
from rosa_kernels.road_kernels import road_backward_kernel, road_forward_kernel, road_reduce_kernel

NUM_WARPS = 4
TILE_BYTES = 32 * NUM_WARPS * 16  # of the first elements of a tile's pairs: one 128-bit access a thread
MAX_BLOCK_T = 64
BLOCK_P = 64  # pairs: 128 columns side by side, or 64 and 64
PROGRAMS = 1024  # to aim at: some waves of what a large GPU holds at once
BLOCK_R = 16  # rows of sums at a time


def forward_launch(
    x: Tensor, theta: Tensor, alpha: Tensor, index: Tensor | None, variant: int, group: int, head_dim: int,
    inplace: bool = False,
) -> Launch:  # fmt: skip
    """The forward launch. Its output is z, a dense tensor or, `inplace`, x itself, which is dense then.

    The arguments are as `road` has them, but for `head_dim`: it is `group` where all groups are alike.
    """
    out = x if inplace else x.new_empty(x.shape)
    arguments, programs, _ = _arguments(x, theta, alpha, index, variant, group, head_dim)
    arguments |= _row_arguments(index, x=x, out=out)
    return Launch(road_forward_kernel, programs, NUM_WARPS, arguments, (out,))


def backward_launch(
    dout: Tensor, kept: Tensor | None, theta: Tensor, alpha: Tensor, index: Tensor | None,
    variant: int, group: int, head_dim: int, need_dx: bool,
) -> Launch:  # fmt: skip
    """The backward launch over tokens. Its outputs are dx and the partial sums `[2 * rows, columns]` from which
    `reduce_launch` makes the gradients of theta and alpha; dx is empty where it is not asked for.

    `kept` is forward's output for variant 1 and its input for the others, or None: then there are no rows of sums.
    """
    arguments, programs, rows = _arguments(dout, theta, alpha, index, variant, group, head_dim)
    dx = dout.new_empty(dout.shape if need_dx else 0)
    sums = empty_sums(dout, 0 if kept is None else rows, columns_of_sums(theta, variant))
    arguments |= _row_arguments(index, dout=dout, kept=dout if kept is None else kept, dx=dx if need_dx else dout)
    arguments |= dict(sums=sums, NEED_DX=need_dx, NEED_SUMS=kept is not None)
    return Launch(road_backward_kernel, programs, NUM_WARPS, arguments, (dx, sums))


def reduce_launch(
    sums: Tensor, index: Tensor | None, theta: Tensor | None, alpha: Tensor | None,
    key_theta: Tensor | None, key_alpha: Tensor | None, variant: int, needs: list[bool],
) -> Launch:  # fmt: skip
    """The launch that adds up rows of partial sums. Its outputs are the gradients of theta, alpha, key_theta and
    key_alpha; `needs` says for each whether it is asked for: the others come back empty.

    A row of sums holds the columns of theta and alpha, then those of the keys' (`rope_road`); either two may be None,
    and have no columns then. The rows are those of the first sequence, then of the second, as many of each.
    """
    given = next(t for t in (theta, key_theta) if t is not None)
    columns, key_columns = columns_of_sums(theta, variant), columns_of_sums(key_theta, variant)
    weights = [given if t is None else t.contiguous() for t in (theta, alpha, key_theta, key_alpha)]
    grads = [w.new_empty(w.shape if need else 0) for w, need in zip(weights, needs, strict=True)]
    names, need_names = ("theta", "alpha", "key_theta", "key_alpha"), ("DTHETA", "DALPHA", "DKEY_THETA", "DKEY_ALPHA")
    indexed = index is not None
    block = min(BLOCK_P, next_power_of_2(max(columns, key_columns)))
    arguments: dict[str, Any] = dict(zip(names, weights, strict=True))
    arguments |= {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    arguments |= {f"NEED_{name}": need for name, need in zip(need_names, needs, strict=True)}
    arguments |= dict(
        sums=sums, index=index if indexed else sums, rows=sums.shape[0] // 2,
        sequences=index.shape[0] if indexed else 1,
        VARIANT=variant, INDEXED=indexed, COLUMNS=columns, KEY_COLUMNS=key_columns, BLOCK_R=BLOCK_R, BLOCK=block,
    )  # fmt: skip
    programs = cdiv(columns, block) + cdiv(key_columns, block)
    programs *= given.shape[0] if indexed else 1
    return Launch(road_reduce_kernel, programs, NUM_WARPS, arguments, tuple(grads))


def columns_of_sums(theta: Tensor | None, variant: int) -> int:
    """A column for every pair of variant 1, for every row of the others."""
    return 0 if theta is None else theta.shape[-1] // (2 if variant == 4 else 1)


def empty_sums(like: Tensor, rows: int, columns: int) -> Tensor:
    """Room for partial sums, in the dtype that is computed in. Each row of sums is two rows of the tensor: a size that
    may be 1 would have torch.compile make a graph for that case."""
    return like.new_empty(2 * rows, columns, dtype=compute_dtype(like.dtype))


def divide_tokens(batch: int, seq: int, index: Tensor | None, block_t: int, others: int) -> tuple[dict[str, Any], int]:
    """How the tokens are divided among programs, and how many stand along them, each with its row of sums; `others` is
    how many stand beside each other at the same tokens.

    The tokens, with an index those of every sequence, are split among `splits` programs that do `steps` blocks each,
    so that there are some PROGRAMS programs, or as many for every sequence. Written without a branch on the tokens, by
    which torch.compile would make a graph for each outcome, and without a division by what it does not know, in whose
    simplification it would take minutes.
    """
    sequences, span = (1, batch * seq) if index is None else (batch, seq)
    blocks, most = cdiv(span, block_t), cdiv(PROGRAMS, others)
    splits, steps = torch.sym_min(blocks, most), cdiv(blocks, most)
    arguments = dict(tokens=batch * seq, splits=splits, steps=steps, INDEXED=index is not None, BLOCK_T=block_t)
    return arguments, sequences * splits


def _arguments(x, theta, alpha, index, variant: int, group: int, head_dim: int) -> tuple[dict[str, Any], int, int]:
    """The arguments that both kernels over tokens share, their programs, and rows of sums; x may be a gradient."""
    batch, seq, width = _sequences(x, index).shape
    width = int(width)  # a constant of the graph, even where torch.compile takes every size for dynamic
    block_p = min(BLOCK_P, next_power_of_2(width // 2))
    block_t = min(max(1, TILE_BYTES // x.element_size() // block_p), MAX_BLOCK_T)
    column_blocks = cdiv(width // 2, block_p)
    arguments, rows = divide_tokens(batch, seq, index, block_t, column_blocks)
    arguments |= dict(
        theta=theta.contiguous(), alpha=alpha.contiguous(), index=theta if index is None else index, seq=seq,
        VARIANT=variant, WIDTH=width, GROUP=group, HEAD_DIM=head_dim, BLOCK_P=block_p,
        COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return arguments, rows * column_blocks, rows


def _row_arguments(index: Tensor | None, **tensors: Tensor) -> dict[str, Any]:
    """Tensors `[..., width]` as `_sequences` has them, each of one head."""
    return {name: heads_argument(_sequences(t, index).unsqueeze(1)) for name, t in tensors.items()}


def _sequences(t: Tensor, index: Tensor | None) -> Tensor:
    """`[..., width]` as `[batch, seq, width]`: a view, except of more than three dimensions that do not lie one behind
    the other."""
    if t.dim() == 1:
        return t[None, None]
    if t.dim() == 2:
        return t.unsqueeze(0 if index is None else 1)
    return t.flatten(1, -2)


register(
    "road_forward",
    "(Tensor x, Tensor theta, Tensor alpha, Tensor? index, int variant, int group, int head_dim) -> Tensor",
    forward_launch,
)
register(
    "road_backward",
    "(Tensor dout, Tensor? kept, Tensor theta, Tensor alpha, Tensor? index, int variant, int group, int head_dim, "
    "bool need_dx) -> (Tensor, Tensor)",
    backward_launch,
)
register(
    "road_reduce",
    "(Tensor sums, Tensor? index, Tensor? theta, Tensor? alpha, Tensor? key_theta, Tensor? key_alpha, int variant, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    reduce_launch,
)


_forward_launch_ = partial(forward_launch, inplace=True)


def _road_(x, *arguments) -> None:
    run_launch(_forward_launch_, x, *arguments)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # so that a graph that had kept x complains, and is not wrong


torch.library.define(
    "rosa::road_",
    "(Tensor(a!) x, Tensor theta, Tensor alpha, Tensor? index, int variant, int group, int head_dim) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("rosa::road_", "default", _road_)
torch.library.register_fake("rosa::road_", lambda *arguments: None)


class _Road(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, alpha, index, *options):
        out = torch.ops.rosa.road_forward(x, theta, alpha, index, *options)
        needs_x, *needs_weights = ctx.needs_input_grad[:3]
        kept = (out if options[0] == 1 else x) if any(needs_weights) else None
        ctx.save_for_backward(theta, alpha, index, kept)
        ctx.needs, ctx.options = (needs_x, needs_weights), options
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("road")
        theta, alpha, index, kept = _saved(ctx)
        needs_x, needs_weights = ctx.needs
        dx, sums = torch.ops.rosa.road_backward(dout, kept, theta, alpha, index, *ctx.options, needs_x)
        grads = [dx if needs_x else None, None, None]
        if any(needs_weights):
            needs = [*needs_weights, False, False]
            of_weights = torch.ops.rosa.road_reduce(sums, index, theta, alpha, None, None, ctx.options[0], needs)
            grads[1:] = (g if need else None for g, need in zip(of_weights, needs_weights, strict=False))
        return *grads, *[None] * (1 + len(ctx.options))


def _saved(ctx: Any) -> tuple[Tensor | None, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error) or ctx.options[0] != 1:
            raise
        raise RuntimeError(
            "road of variant 1 keeps its output for backward on the Triton backend, and what came after has written "
            "over it, as the code of Falcon and Llama 4 does with an MLP's output: use variant=2, which keeps its "
            "input, or leave that linear layer out"
        ) from error


def road_triton(
    x: Tensor, theta: Tensor, alpha: Tensor, index: Tensor | None, variant: int, group: int, head_dim: int,
    inplace: bool,
) -> Tensor:  # fmt: skip
    """`rosa_kernels.road` on the Triton backend, its arguments checked; `head_dim` as `forward_launch` takes it."""
    arguments = (x, theta, alpha, index, variant, group, head_dim)
    refuse_forward_mode("road", x, theta, alpha)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, theta, alpha)):
        return _Road.apply(*arguments)
    if inplace and x.is_contiguous() and not torch.compiler.is_compiling():
        torch.ops.rosa.road_(*arguments)
        return x
    return torch.ops.rosa.road_forward(*arguments)


def road_heads_triton(x: Tensor, *arguments) -> Tensor:
    """`road_triton` of queries or keys `[b, h, l, d]`, which were one output `[b, l, h * d]` of a linear layer."""
    flat = x.transpose(1, 2).flatten(2)
    return road_triton(flat, *arguments, inplace=False).unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)
