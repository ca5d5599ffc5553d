"""How far an op's outputs and gradients lie from those of the same mathematics in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.providers import Inputs, Provider, leaves


def accuracy(name: str, provider: Provider, exact: Provider, x: Inputs) -> dict[str, float]:
    """Errors of a provider against `exact` in float64, from the same inputs and the same gradients of the outputs.

    Returns:
        The largest absolute error and the error in L2 relative to the exact tensor, each the worst of the outputs
        (`output_max_abs`, `output_relative_l2`) and the worst of the gradients (`gradient_...`).
    """
    wide = type(x)(*(t.detach().double().requires_grad_(t.requires_grad) for t in x))
    exact_outputs = exact(wide)  # first: Liger's rotates q and k in place
    outputs = provider(x)
    directions = [torch.randn_like(t) for t in outputs]
    exact_gradients = torch.autograd.grad(exact_outputs, leaves(wide, name), [d.double() for d in directions])
    before_backward = _errors("output", outputs, exact_outputs)
    return before_backward | _errors(
        "gradient", torch.autograd.grad(outputs, leaves(x, name), directions), exact_gradients
    )


def _errors(kind: str, ours: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    differences = [a.detach().double() - b.detach() for a, b in zip(ours, exact, strict=True)]
    return {
        f"{kind}_max_abs": max(d.abs().max().item() for d in differences),
        f"{kind}_relative_l2": max((d.norm() / b.norm()).item() for d, b in zip(differences, exact, strict=True)),
    }
