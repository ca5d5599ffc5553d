"""The attention shapes of models, and what is launched at such a shape, on meta tensors: for the offline compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.reference import half_width
from rosa_kernels.road_dispatch import rope_road_fuses

RANK = 128  # the paper's


class Shape(NamedTuple):
    """The attention shape of a model. `low_pairs` is n at r_low = 0.25; without `rotary_dim` the whole head rotates."""

    name: str
    heads: int
    key_heads: int
    head_dim: int
    low_pairs: int
    rotary_dim: int | None = None
    interleaved: bool = False


SHAPES = (
    Shape("Qwen2.5-7B", 28, 4, 128, 16),
    Shape("Llama-3.1-8B", 32, 8, 128, 16),
    Shape("Gemma-2-9B", 16, 8, 256, 32),
)


def launches(shape: Shape, batch: int = 1, seq: int = 2048, dtype: torch.dtype = torch.bfloat16) -> Iterator:
    """RoAE's launches in one training step of one layer, on meta tensors laid out as Hugging Face's models have them.

    Those of `roae` (of rank 128), then those of its simpler form `rope_roae`.
    """
    from rosa_kernels import roae_triton, rope_roae_triton

    empty = partial(torch.empty, dtype=dtype, device="meta")
    q, k, cos = _heads(shape, batch, seq, empty)
    columns, key_columns = (2 * count * shape.low_pairs for count in (shape.heads, shape.key_heads))
    layout = dict(alpha=0.1, interleaved=shape.interleaved)

    grouped = shape.heads != shape.key_heads
    gqa = (empty(RANK, columns), empty(key_columns, RANK)) if grouped else (None, None)
    latent, up = empty(batch * seq, RANK), empty(columns, RANK)
    forward = roae_triton.forward_launch(q, k, cos, cos, latent, up, *gqa, **layout, store=True)
    yield forward
    low, key_latent = forward.outputs[2:]
    options = dict(**layout, sequence_major=True, need_dx=True, need_du=True, need_dgqa=grouped)
    dkey_latent = None
    if grouped:
        keys = roae_triton.backward_keys_launch(k, cos, cos, gqa[1], low, key_latent, shape.heads, **options)
        yield keys
        dkey_latent = keys.outputs[1]
    yield roae_triton.backward_launch(q, k, cos, cos, latent, up, gqa[0], low, dkey_latent, **options)

    signals = (empty(batch, seq, columns), empty(batch, seq, key_columns))
    forward = rope_roae_triton.forward_launch(q, k, cos, cos, *signals, **layout, store_low=True)
    yield forward
    low = forward.outputs[-1]
    yield rope_roae_triton.backward_launch(
        q, k, cos, cos, *signals, low, **layout, sequence_major=True, needs=[True] * 4
    )


def road_launches(
    shape: Shape, batch: int = 1, seq: int = 2048, dtype: torch.dtype = torch.bfloat16, *,
    variant: int = 2, neighbours: bool = True, indexed: bool = False,
) -> Iterator:  # fmt: skip
    """RoAd's launches in one training step: `road` of the queries' projection, then `rope_road` where it is fused.

    Pairs are neighbours, or else the rotary pairs, with a group as large as the rotary part; `indexed` has a sequence
    take one of eight adapters.
    """
    from rosa_kernels import road_triton, rope_road_triton

    empty = partial(torch.empty, dtype=dtype, device="meta")
    q, k, cos = _heads(shape, batch, seq, empty)
    rotary_dim = shape.rotary_dim or shape.head_dim
    group = 2 if neighbours else rotary_dim
    block = 2 if neighbours else shape.head_dim
    width, key_width = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    query, key = (
        [empty(*[8] * indexed, w * variant // 2, dtype=torch.float32) for _ in range(2)] for w in (width, key_width)
    )
    index = empty(batch, dtype=torch.int32) if indexed else None

    x = empty(batch, seq, width)
    yield road_triton.forward_launch(x, *query, index, variant, group, block)
    backward = road_triton.backward_launch(x, x.clone(), *query, index, variant, group, block, need_dx=True)
    yield backward
    needs = [True] * 2
    yield road_triton.reduce_launch(backward.outputs[1], index, *query, None, None, variant, [*needs, False, False])

    layout = dict(interleaved=shape.interleaved, rotary_dim=rotary_dim)
    if not rope_road_fuses(shape.head_dim, group=group, head_dim=shape.head_dim, **layout):
        return
    options = (variant, neighbours and not shape.interleaved, shape.interleaved)
    yield rope_road_triton.forward_launch(q, k, cos, cos, index, *query, *key, *options)
    kept = (q.clone(), k.clone())
    backward = rope_road_triton.backward_launch(q, k, cos, cos, index, *query, *key, *kept, *options, True, True, True)
    yield backward
    yield road_triton.reduce_launch(backward.outputs[2], index, *query, *key, variant, needs * 2)


def _heads(shape: Shape, batch: int, seq: int, empty: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and cos (which does for sin too), with one column a pair."""
    q, k = (empty(batch, seq, count, shape.head_dim).transpose(1, 2) for count in (shape.heads, shape.key_heads))
    rotary_dim = shape.rotary_dim or shape.head_dim
    return q, k, half_width(empty(1, seq, rotary_dim), rotary_dim, shape.interleaved)
