"""Distributed interchange intervention: some rotated dimensions of a state take another run's values."""

from __future__ import annotations

from torch import Tensor


def dii(b: Tensor, s: Tensor, R: Tensor) -> Tensor:
    """DII(b, s, R) = b + R^T (R s - R b).

    In the subspace that R's rows span, b takes the values of s; outside of it b stays. Where R spans all, it is s.
    RoAd_1 with scales of 1 has this form, with R^T for R and h for the source's R^T s: R h = h + R (h - R^T h).

    Args:
        b (Tensor): hidden states of the run that is changed, `[..., d]`.
        s (Tensor): hidden states of the source run, of b's shape, or one that broadcasts to it.
        R (Tensor): orthonormal rows, `[dimensions, d]` with at most d of them, of b's dtype: some rows of a rotation.

    Returns:
        Tensor: of b's shape.

    Raises:
        ValueError: the shapes do not fit. That R's rows are orthonormal is not checked.
    """
    if R.dim() != 2 or R.shape[0] > R.shape[1] or not R.shape[1] == b.shape[-1] == s.shape[-1]:
        raise ValueError(
            f"R must be [dimensions, d] with at most d rows, b and s [..., d]; got R {list(R.shape)}, b "
            f"{list(b.shape)} and s {list(s.shape)}"
        )
    return b + (s @ R.T - b @ R.T) @ R
