"""The public ops `road` and `rope_road`."""

from __future__ import annotations

from torch import Tensor

from rosa_kernels.checks import check_tensors
from rosa_kernels.dispatch import choose_backend
from rosa_kernels.road_checks import check_angles, check_index, check_pairing
from rosa_kernels.road_reference import road_reference


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
            any strides.
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
        inplace (bool): x may be overwritten. It is, and is returned, where it is dense, no graph is made (gradients are
            disabled, or nothing requires one) and nothing compiles, on the Triton backend.
        backend (str, optional): "triton" or "reference"; None takes the environment variable ROSA_BACKEND, and without
            it "triton" on a GPU and "reference" elsewhere.

    Returns:
        z with x's shape and dtype. Computed in float32 (float64 for float64 x) and rounded once.

    Raises:
        TypeError: an argument is no tensor, or its dtype does not fit.
        ValueError: a shape, device or number does not fit, or an unknown backend.
        RuntimeError: the Triton backend cannot run on x's device; double backward through it.

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
    if choose_backend(backend, x) == "reference":
        return road_reference(x, theta, alpha, index, variant=variant, group=group, head_dim=head_dim)
    from rosa_kernels.road_triton import road_triton

    return road_triton(x, theta, alpha, index, variant, group, _block(group, head_dim), inplace)


def _block(group: int, head_dim: int | None) -> int:
    """After how many outputs the pairing repeats: neighbours do so at once, whatever the head."""
    return group if head_dim is None or group == 2 else head_dim
