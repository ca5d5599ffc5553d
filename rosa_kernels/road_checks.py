"""The input checks of RoAd's ops: what was given, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels.checks import check_tensors
from rosa_kernels.road_reference import NUMBERS


def check_pairing(width: int, variant: int, group: int, head_dim: int | None) -> None:
    """Raises on a variant that there is not, and on a pairing that does not fit outputs of `width`."""
    if variant not in NUMBERS:
        raise ValueError(f"variant must be 1, 2 or 4, got {variant!r}")
    if width < 2 or width % 2:
        raise ValueError(f"RoAd turns pairs: the width must be even and at least 2, got {width}")
    if group < 2 or group % 2:
        raise ValueError(f"group must be even and at least 2, got {group}")
    if head_dim is None:
        if width % group:
            raise ValueError(f"group must divide the width, got group {group} and width {width}")
    elif head_dim < group or head_dim % 2 or width % head_dim:
        raise ValueError(
            f"head_dim must be even, at least group={group} and divide the width, got head_dim {head_dim} "
            f"and width {width}"
        )


def check_angles(x_name: str, x: Tensor, width: int, name: str, theta: Tensor, alpha: Tensor, index, variant) -> None:
    """Raises on angles or scales that do not fit an output of `width`, which is `x`."""
    angles, scales = (f"{name}{kind}" for kind in ("theta", "alpha"))
    check_tensors(**{x_name: x, angles: theta, scales: alpha})
    numbers = int(width * NUMBERS[variant])
    shape = f"[{numbers}]" if index is None else f"[adapters, {numbers}]"
    if theta.dim() != (1 if index is None else 2) or theta.shape[-1] != numbers or 0 in theta.shape:
        with_index = "without an index" if index is None else "with an index"
        raise ValueError(
            f"{angles} must be {shape} {with_index} (variant {variant}, width {width}), got {list(theta.shape)}"
        )
    if alpha.shape != theta.shape:
        raise ValueError(f"{scales} must have {angles}'s shape {list(theta.shape)}, got {list(alpha.shape)}")


def check_index(index: Tensor, x_name: str, x: Tensor, adapters: int) -> None:
    """Raises on an index that does not fit x's batch or, on the CPU, names no row of tables of `adapters` rows.

    On a GPU the numbers are not looked at: that would wait for it.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.dtype != torch.int32:
        raise TypeError(f"index must be int32, got {index.dtype}")
    if x.dim() < 2 or index.shape != (x.shape[0],):
        raise ValueError(
            f"index must have a number for each of {x_name}'s sequences, [{x.shape[0]}], for "
            f"{list(x.shape)}, got {list(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"index is on {index.device}, but {x_name} is on {x.device}: all must be on one device")
    if index.is_cpu and index.numel() and not torch.compiler.is_compiling():
        # As a list, which launches nothing that a count of launches would see.
        wrong = next((number for number in index.tolist() if not 0 <= number < adapters), None)
        if wrong is not None:
            raise ValueError(f"index must be from 0 to {adapters - 1}, a row of the tables, got {wrong}")
