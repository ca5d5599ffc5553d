"""RoAd (2D rotary adaptation) in plain PyTorch: the specification that every backend is tested against.

Symbols: d width of a linear layer's output, theta and alpha the angles and scales of its pairs. The numbers that a
variant has: 1 a pair's theta and alpha (d / 2 each), 2 a row's (d each), 4 a row's for its cosine and for its sine term
(2 d each, `[2, d]` flattened).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosa_kernels.reference import compute_dtype, rope_roae_reference

NUMBERS = {1: 0.5, 2: 1, 4: 2}  # of theta, and of alpha, an output


def road_reference(
    x: Tensor,
    theta: Tensor,
    alpha: Tensor,
    index: Tensor | None = None,
    *,
    variant: int,
    group: int = 2,
    head_dim: int | None = None,
) -> Tensor:
    """What `rosa_kernels.road` computes, which documents the arguments, in differentiable PyTorch.

    It computes in float32 (float64 for float64 inputs), as the kernels do, and rounds once, to x's dtype.
    """
    compute = compute_dtype(x.dtype)
    first, second = coefficients(
        theta.to(compute), alpha.to(compute), x.shape[-1], variant=variant, group=group, head_dim=head_dim
    )
    if index is not None:
        first, second = (t[index].reshape(len(index), *(1,) * (x.dim() - 2), x.shape[-1]) for t in (first, second))
    h = x.to(compute)
    z = first * h + second * rotate(h, group, head_dim)  # Eq. 4
    return torch.empty_like(x).copy_(z)


def rope_road_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    query: tuple[Tensor, Tensor] | None,
    key: tuple[Tensor, Tensor] | None,
    index: Tensor | None = None,
    *,
    variant: int,
    group: int = 2,
    head_dim: int | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What `rosa_kernels.rope_road` computes, which documents the arguments, in differentiable PyTorch.

    It computes in float32 (float64 for float64 inputs), as the kernels do, and rounds once, to the inputs' dtype.
    """
    compute = compute_dtype(q.dtype)
    options: dict[str, Any] = dict(variant=variant, group=group, head_dim=head_dim)
    adapted_q, adapted_k = (
        x.to(compute) if weights is None else _of_heads(x.to(compute), *weights, index, **options)
        for x, weights in ((q, query), (k, key))
    )
    silent_q, silent_k = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1] * 2) for x in (adapted_q, adapted_k))
    rotated_q, rotated_k = rope_roae_reference(
        adapted_q,
        adapted_k,
        cos,
        sin,
        silent_q,
        silent_k,
        alpha=0.0,
        interleaved=interleaved,
        rotary_dim=rotary_dim,
    )
    return torch.empty_like(q).copy_(rotated_q), torch.empty_like(k).copy_(rotated_k)


def coefficients(
    theta: Tensor, alpha: Tensor, width: int, *, variant: int, group: int = 2, head_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """The two vectors of Eq. 4, z = first * h + second * rot(h), from angles and scales.

    Args:
        theta, alpha (Tensor): angles in radians and scales, `[..., numbers]`.
        width (int): d, of the linear layer's output.
        variant (int): 1, 2 or 4.
        group, head_dim (int): the pairing, as `rosa_kernels.road` takes it.

    Returns:
        first, second: `[..., width]`, of theta's dtype.
    """
    if variant == 1:
        at = pair_of(width, group, head_dim, theta.device)
        theta, alpha = theta[..., at], alpha[..., at]
    if variant == 4:
        (theta, theta_sin), (alpha, alpha_sin) = (t.unflatten(-1, (2, width)).unbind(-2) for t in (theta, alpha))
    else:
        theta_sin, alpha_sin = theta, alpha
    return alpha * theta.cos(), alpha_sin * theta_sin.sin()


def rotate(h: Tensor, group: int = 2, head_dim: int | None = None) -> Tensor:
    """rot(h1, h2) = (-h2, h1) of every pair (Eq. 4)."""
    heads = h.unflatten(-1, (-1, group if head_dim is None else head_dim))
    one, other = heads[..., :group].unflatten(-1, (2, -1)).unbind(-2)
    turned = [-other, one]
    if group < heads.shape[-1]:  # the rest of a head, which pairs as neighbours
        one, other = heads[..., group:].unflatten(-1, (-1, 2)).unbind(-1)
        turned.append(torch.stack((-other, one), dim=-1).flatten(-2))
    return torch.cat(turned, dim=-1).flatten(-2)


def pairs(width: int, group: int, head_dim: int | None, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The first and the second element of every pair, `[width / 2]` each, in the order of variant 1's numbers."""
    block = group if head_dim is None else head_dim
    grouped, rest = torch.arange(group).view(2, -1), torch.arange(group, block).view(-1, 2).T
    one, other = torch.cat((grouped, rest), dim=1)
    starts = torch.arange(0, width, block)[:, None]
    return (starts + one).flatten().to(device), (starts + other).flatten().to(device)


def pair_of(width: int, group: int, head_dim: int | None, device: torch.device | None = None) -> Tensor:
    """The number of the pair that each element is in, `[width]`."""
    one, other = pairs(width, group, head_dim)
    at = torch.empty(width, dtype=torch.long)
    at[one] = at[other] = torch.arange(width // 2)
    return at.to(device)


def _of_heads(x: Tensor, theta: Tensor, alpha: Tensor, index: Tensor | None, **options: Any) -> Tensor:
    """RoAd of queries or keys `[b, h, l, d]`, which were one output `[b, l, h * d]` of a linear layer."""
    heads = x.shape[1]
    flat = x.transpose(1, 2).flatten(2)
    return road_reference(flat, theta, alpha, index, **options).unflatten(-1, (heads, -1)).transpose(1, 2)
