"""One pass of a function: forward, backward and both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MODES = ("forward", "backward", "both")


def one_pass(mode: str, function: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> Callable[[], object]:
    """What is timed: `function`, the gradients of its outputs, or both.

    Args:
        mode (str): one of MODES.
        function (callable): gives the outputs, anew at each call.
        leaves (sequence of Tensor): what gets gradients.
    """
    outputs = function()
    directions = [torch.randn_like(t) for t in outputs]
    if mode == "forward":
        return function
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, directions, retain_graph=True)
    return lambda: torch.autograd.grad(function(), leaves, directions)
