"""Algorithm 1 of the paper: when layers are selected, and which. It knows no model: scores in, choice out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Selection(NamedTuple):
    """One selection: the step it was made at (from 1), the decoder layers chosen, whether by score (else at random),
    and the score of every layer that takes part."""

    step: int
    layers: tuple[int, ...]
    exploited: bool
    scores: tuple[float, ...]


# Of the selections so far and the scores of this step: the numbers that rank the layers, one each, the highest first.
Priorities = Callable[[Sequence[Selection], tuple[float, ...]], Sequence[float]]


class Selector:
    """Counts the steps, and at some of them selects the layers that train from then on.

    Args:
        layers (tuple of int): those that take part, and that train before the first selection.
        k_ratio, interval, warmup_steps, p_exploit, seed, priorities: as of `DynamicLayerSelection`.

    Attributes:
        k (int): how many layers a selection chooses.
        steps (int): how many have been taken.
        selected_layers (tuple of int): the layers that train now.
        history (list of Selection): all selections so far.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        k_ratio: float,
        interval: int,
        warmup_steps: int,
        p_exploit: float,
        seed: int,
        priorities: Priorities | None = None,
    ):
        # The margin keeps products such as 0.29 * 100, one rounding below a whole number, on that number.
        self.k = max(1, math.floor(k_ratio * len(layers) + 1e-9))
        self.interval, self.warmup_steps, self.p_exploit = interval, warmup_steps, p_exploit
        self.priorities = priorities
        self.steps = 0
        self.selected_layers = layers
        self.history: list[Selection] = []
        self._generator = torch.Generator("cpu").manual_seed(seed)

    @property
    def selects_next(self) -> bool:
        """Whether the next step selects."""
        step = self.steps + 1
        return step > self.warmup_steps and step % self.interval == 0

    def choose(self, layers: tuple[int, ...], scores: tuple[float, ...]) -> Selection:
        """What the next step selects, drawn but not adopted: with probability `p_exploit` the top k layers by score, or
        by `priorities`, otherwise k of them at random."""
        exploit = bool(torch.rand((), generator=self._generator, device="cpu") < self.p_exploit)
        if exploit:
            values = scores if self.priorities is None else self.priorities(self.history, scores)
            ranked = sorted(range(len(scores)), key=lambda i: -values[i])  # the lower of two equal layers comes first
        else:
            ranked = torch.randperm(len(scores), generator=self._generator, device="cpu").tolist()
        return Selection(self.steps + 1, tuple(sorted(layers[i] for i in ranked[: self.k])), exploit, scores)

    def adopt(self, selection: Selection) -> None:
        """Has its layers train from now on."""
        self.history.append(selection)
        self.selected_layers = selection.layers

    def state_dict(self) -> dict[str, Any]:
        """The course so far, and where the generator stands."""
        return {
            "step": self.steps,
            "selected_layers": list(self.selected_layers),
            "history": [tuple(selection) for selection in self.history],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave: the course goes on as if it had not stopped."""
        self.steps = state["step"]
        self.selected_layers = tuple(state["selected_layers"])
        self.history = [Selection(s, tuple(layers), e, tuple(scores)) for s, layers, e, scores in state["history"]]
        self._generator.set_state(state["generator"].cpu())


def check_settings(k_ratio: float, interval: int, warmup_steps: int, p_exploit: float, seed: int) -> None:
    """Raises TypeError or ValueError if one of them is of the wrong type or out of its range."""
    for name, value in (("interval", interval), ("warmup_steps", warmup_steps), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not -(2**63) <= seed < 2**64:  # what torch's generators take
        raise ValueError(f"seed must lie in -2**63 to 2**64 - 1, got {seed}")
    if not 0 < k_ratio <= 1:
        raise ValueError(f"k_ratio must lie in (0, 1], got {k_ratio}")
    if interval < 1:
        raise ValueError(f"interval must be at least 1 step, got {interval}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    if not 0 <= p_exploit <= 1:
        raise ValueError(f"p_exploit must lie in [0, 1], got {p_exploit}")
