"""The weights of norms, which the base and every adapter that trains them take turns to put into the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class NormWeight(NamedTuple):
    """What the weight of a norm holds: for the base, and for every adapter that trains it."""

    data: Tensor
    grad: Tensor | None
    requires_grad: bool


def trained_weight(norm: nn.Module, base: Tensor, dtype: torch.dtype) -> NormWeight:
    """A norm's weight as an adapter begins to train it: the base's value, in the adapter's dtype if that is wider.

    In bfloat16 a step of 1e-3 on a weight of 1 rounds to none. The norm's output keeps the input's dtype, so the model
    computes what it did.

    Raises:
        ValueError: ZeRO-3 has partitioned the norm in a narrower dtype.
    """
    wide = trained_dtype(norm, base.dtype, dtype)
    if wide != base.dtype and hasattr(norm.weight, "ds_id"):
        raise ValueError(
            f"ZeRO-3 has partitioned the norms in {base.dtype} already, and trains parameters of one dtype only: use "
            f'a configuration with adapter_dtype="{str(base.dtype).removeprefix("torch.")}", of which ZeRO keeps a '
            "float32 copy"
        )
    return NormWeight(base.detach().to(wide, copy=True), None, True)


def trained_dtype(norm: nn.Module, base: torch.dtype, adapter: torch.dtype) -> torch.dtype:
    """In which dtype an adapter of this one trains a norm whose weight is of the base's: the wider of the two."""
    widens = not isinstance(norm, nn.LayerNorm)  # whose kernels want input and weight alike
    return torch.promote_types(base, adapter) if widens else base


def widened(norm: nn.Module, weight: Tensor) -> Tensor:
    """An adapter's weight for a norm of the base, which may have another dtype than when the adapter was made."""
    return weight.to(trained_dtype(norm, norm.weight.dtype, weight.dtype))


def exchange(weight: nn.Parameter, incoming: NormWeight) -> NormWeight:
    """Puts a value in and returns what was there.

    By `.data` and not in place: backward through a graph from before still finds its values once they are back.
    """
    outgoing = NormWeight(weight.data, weight.grad, weight.requires_grad)
    weight.grad = None
    # A base on the meta device had no values: those that the model was given since stay.
    data = weight.data.to(incoming.data.dtype) if incoming.data.is_meta else incoming.data.to(weight.device)
    weight.data = data
    weight.grad = None if incoming.grad is None else incoming.grad.to(weight.device)
    weight.requires_grad_(incoming.requires_grad)
    return outgoing


def keep_dtype(norm: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """A forward hook: the output of a widened norm in the dtype of its input, the first argument."""
    x = args[0] if args else next(iter(kwargs.values()))
    return output.to(x.dtype)
