"""Rules by which the layers that train are chosen: the paper's, and others that look at what backward costs.

Of the rules that select, each is a `priorities` of DynamicLayerSelection, and differs from the paper's in that alone: a
selection at random (1 - p_exploit) is the same under all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rosa.selection.algorithm import Priorities, Selection

Costs = Sequence[float]  # of each layer: what backward costs from the loss down to it, in any unit


class Rule(NamedTuple):
    """Which layers train."""

    title: str
    adapted: tuple[float, float] = (0.0, 1.0)  # the share of the layers, from and to, that has an adapter
    selects: bool = True  # by Algorithm 1; else all that have an adapter train
    priorities: Callable[[Costs, int], Priorities] | None = None  # of the costs and k; None: by score, as in the paper
    length: float = 1.0  # its steps, in those of the other rules


def by_cost(costs: Costs, k: int) -> Priorities:
    """The score, divided by what backward costs down to the layer."""
    return lambda history, scores: [score / cost for score, cost in zip(scores, costs, strict=True)]


def relative(costs: Costs, k: int) -> Priorities:
    """The score, divided by the mean of the layer's scores at earlier selections; the first is the paper's."""

    def priorities(history: Sequence[Selection], scores: tuple[float, ...]) -> Sequence[float]:
        if not history:
            return scores
        earlier = [sum(course) for course in zip(*(selection.scores for selection in history), strict=True)]
        return [score / total if total else 0.0 for score, total in zip(scores, earlier, strict=True)]

    return priorities


def block(costs: Costs, k: int) -> Priorities:
    """The k neighbours whose scores have the largest sum."""
    return lambda history, scores: _best_block(scores, k, [1.0] * len(scores))


def block_by_cost(costs: Costs, k: int) -> Priorities:
    """The k neighbours whose scores have the largest sum for what backward costs down to the lowest of them."""
    return lambda history, scores: _best_block(scores, k, costs)


def _best_block(scores: Sequence[float], k: int, costs: Costs) -> list[float]:
    worth = [sum(scores[i : i + k]) / costs[i] for i in range(len(scores) - k + 1)]
    lowest = worth.index(max(worth))
    return [float(lowest <= i < lowest + k) for i in range(len(scores))]


# Each longer run takes about as many operations as a run of all layers does: measured, on arithmetic.
RULES = {
    "all": Rule("all layers", selects=False),
    "paper": Rule("the paper's rule"),
    "by_cost_longer": Rule("score by cost, longer", priorities=by_cost, length=1.1),
    "upper_longer": Rule("the upper half, longer", adapted=(0.5, 1.0), selects=False, length=1.33),
    "block_by_cost_longer": Rule("a block, by cost, longer", priorities=block_by_cost, length=1.23),
    "by_cost": Rule("score by cost", priorities=by_cost),
    "upper": Rule("the upper half", adapted=(0.5, 1.0), selects=False),
    "block_by_cost": Rule("a block, by cost", priorities=block_by_cost),
    "relative": Rule("relative score", priorities=relative),
    "block": Rule("a block", priorities=block),
}
