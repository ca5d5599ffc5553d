"""The public ops `road` and `rope_road`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rosa_kernels.checks import check_rotary, check_tensors
from rosa_kernels.dispatch import choose_backend
from rosa_kernels.reference import half_width
from rosa_kernels.road_checks import check_angles, check_index, check_pairing
from rosa_kernels.road_reference import road_reference, rope_road_reference


def road(
    x: Tensor,
    theta: Tensor,
    alpha: Tensor,
    index: Tensor | None = None,
    *,
    variant: int,
    group: int = 2,
    head_dim: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Turns and scales the pairs of a linear layer's output, RoAd: z = first * h + second * rot(h), Eq. 4.

    The two vectors of Eq. 4 are made from angles and scales in registers, and so cost no launch of their own: forward
    is one launch, and backward one over the tokens and, where the gradients of theta or alpha are asked for, one that
    adds up their partial sums, always in the same order. Of tensors as large as x, variant 1 saves its output (which
    what comes next usually saves anyway) and the others save x, and only for the gradients of theta and alpha.

    Args:
        x (Tensor): outputs `[..., width]`, with an index `[batch, ..., width]`; float16, bfloat16, float32 or float64;
            any strides that leave the elements of one row less than 2^31 elements apart.
        theta, alpha (Tensor): angles in radians and scales, `[numbers]`, of any floating dtype; numbers is width / 2
            for variant 1 (one for a pair), width for variant 2 (one for a row) and 2 * width for variant 4 (those of
            the cosine terms by row, then those of the sine terms). With an index, tables `[adapters, numbers]`.
        index (Tensor, optional): the row of the tables for each sequence, int32, `[batch]`, on x's device. Only on the
            CPU is it checked to name rows that there are: on a GPU that would wait for it.
        variant (int): 1, 2 or 4. Variant 2 reaches every 2x2 matrix a pair; variant 4 has more numbers, not more
            functions.
        group (int): in every group of so many outputs, element j pairs with j + group / 2: 2 pairs neighbours, the
            head size is RoPE's half layout.
        head_dim (int, optional): with it each head of so many outputs begins with one group, and the rest of the head
            pairs as neighbours (partial rotary).
        inplace (bool): x may be overwritten. It is, and is returned, where it is contiguous, no graph is made
            (gradients are disabled, or nothing requires one) and nothing compiles, on the Triton backend.
        backend (str, optional): "triton" or "reference"; None takes the environment variable ROSA_BACKEND, and without
            it "triton" on a GPU and "reference" elsewhere.

    Returns:
        z with x's shape and dtype. Computed in float32 (float64 for float64 x) and rounded once.

    Raises:
        TypeError: an argument is no tensor, or its dtype does not fit.
        ValueError: a shape, device or number does not fit, or an unknown backend.
        RuntimeError: the Triton backend cannot run on x's device; double backward or forward mode on it.

    The gradient flows to x, theta and alpha; only those that ask for it are computed. Variant 1 finds alpha's gradient
    from its output and divides it by alpha: where a scale is exactly 0 its gradient is given as 0. On a GPU angles are
    exact to 1e-7 up to a million radians in float32.
    """
    check_tensors(x=x)
    width = x.shape[-1] if x.dim() else 0
    check_pairing(width, variant, group, head_dim)
    check_angles("x", x, width, "", theta, alpha, index, variant)
    if index is not None:
        check_index(index, "x", x, theta.shape[0])
        index = index.contiguous()  # as the kernels read it
    if choose_backend(backend, x) == "reference":
        return road_reference(x, theta, alpha, index, variant=variant, group=group, head_dim=head_dim)
    from rosa_kernels.road_triton import road_triton

    return road_triton(x, theta, alpha, index, variant, group, _block(group, head_dim), inplace)


def rope_road(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RoAd of queries and keys and then RoPE: u = A x (Eq. 3), y = R u.

    Where `rope_road_fuses` says so this is one launch forward and one backward, and one more where the gradients of
    angles or scales are asked for. Any other pairing is `road` of q and of k, a launch each, and then the rotation. Of
    tensors as large as q and k, the one launch saves its outputs for variant 1 (as attention does anyway) and q and k
    for the others, and only for the gradients of angles and scales. The inputs are never changed.

    Args:
        q (Tensor): queries `[batch, heads, seq, head_size]`; float16, bfloat16, float32 or float64; any strides
            that leave the elements of one head less than 2^31 elements apart.
        k (Tensor): keys `[batch, key_heads, seq, head_size]`, of q's dtype and device; any strides, as q. Either of q
            and k may have no heads.
        cos, sin (Tensor): as `rope_roae` takes them. cos^2 + sin^2 need not be 1; it must not be 0 where variant 1
            pairs neighbours in the half layout, whose gradients it finds from its outputs.
        query, key (tuple of two tensors, optional): theta and alpha as `road` takes them, for the whole output of the
            projection, of width heads * head_size. None leaves q, or k, to RoPE alone.
        index (Tensor, optional): as `road` takes it; query and key are tables then, with as many rows each. Where both
            are None it is not looked at.
        variant, group, head_dim: as `road` takes them.
        interleaved, rotary_dim, backend: as `rope_roae` takes them.

    Returns:
        q_out, k_out with the shapes and dtypes of q and k, and where these are dense their memory layouts; but what
        the Triton backend turns in a launch before the rotation comes as `[batch, seq, heads, head_size]` in memory.
        Computed in float32 (float64 for float64 inputs) and, in one launch, rounded once.

    Raises:
        TypeError: an argument is no tensor, or its dtype does not fit.
        ValueError: a shape, device or number does not fit, cos or sin require gradients, or an unknown backend.
        RuntimeError: the Triton backend cannot run on these tensors' device; double backward or forward mode on it.

    Gradients as of `road`, whose notes on variant 1 and on angles hold here too.
    """
    rotary_dim = check_rotary(q, k, cos, sin, 0.0, rotary_dim)
    options: dict[str, Any] = dict(variant=variant, group=group, head_dim=head_dim)
    index = _check_heads(q, k, query, key, index, **options)
    if choose_backend(backend, q) == "reference":
        return rope_road_reference(
            q, k, cos, sin, query, key, index, **options, interleaved=interleaved, rotary_dim=rotary_dim
        )
    from rosa_kernels.road_triton import road_heads_triton
    from rosa_kernels.rope_road_triton import rope_road_triton

    cos, sin = half_width(cos, rotary_dim, interleaved), half_width(sin, rotary_dim, interleaved)
    if not rope_road_fuses(q.shape[-1], group=group, head_dim=head_dim, interleaved=interleaved, rotary_dim=rotary_dim):
        block = _block(group, head_dim)
        q, k = (
            x if weights is None else road_heads_triton(x, *weights, index, variant, group, block)
            for x, weights in ((q, query), (k, key))
        )
        query = key = index = None
    neighbours = group == 2 and not interleaved and rotary_dim > 2
    weights = (*(query or (None, None)), *(key or (None, None)))
    return rope_road_triton(q, k, cos, sin, index, weights, variant, neighbours, interleaved)


def rope_road_fuses(
    head_size: int,
    *,
    group: int = 2,
    head_dim: int | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> bool:
    """Whether `rope_road` is one launch: RoAd's pairs are the rotary pairs, or neighbours that do not straddle the two
    halves of RoPE's half layout; beyond the rotary part they are neighbours. Needs no Triton.

    Args:
        head_size (int): elements of a query head.
        group, head_dim: RoAd's pairing, as `road` takes it.
        interleaved, rotary_dim: RoPE's, as `rope_roae` takes them.
    """
    rotary_dim = head_size if rotary_dim is None else rotary_dim
    if group == 2:
        return head_size % 2 == 0 and (interleaved or rotary_dim % 4 == 0 or rotary_dim == 2)
    return group == rotary_dim and _block(group, head_dim) == head_size and not interleaved


def _check_heads(
    q: Tensor, k: Tensor, query: Any, key: Any, index: Tensor | None, *, variant: int, group: int, head_dim: int | None
) -> Tensor | None:
    """Raises on angles, scales or an index that do not fit the outputs of q and k; returns the index,
    dense, or None where there is nothing to index."""
    adapters = set()
    for name, x, x_name, weights in (("query", q, "q", query), ("key", k, "k", key)):
        if weights is None:
            continue
        if not isinstance(weights, (tuple, list)) or len(weights) != 2:
            raise TypeError(f"{name} must be a pair of tensors, theta and alpha, or None, got {type(weights).__name__}")
        width = x.shape[1] * x.shape[3]
        check_pairing(width, variant, group, head_dim)
        theta, alpha = weights
        check_angles(x_name, x, width, f"{name}'s ", theta, alpha, index, variant)
        adapters.add(theta.shape[0])
    if index is None or not adapters:
        return None
    if len(adapters) > 1:
        raise ValueError(f"query and key must be tables of as many adapters, got {' and '.join(map(str, adapters))}")
    check_index(index, "q", q, adapters.pop())
    return index.contiguous()  # as the kernels read it


def _block(group: int, head_dim: int | None) -> int:
    """After how many outputs the pairing repeats: neighbours do so at once, whatever the head."""
    return group if head_dim is None or group == 2 else head_dim
