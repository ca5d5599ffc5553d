"""From the outcomes of cells to means, intervals and tests over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from scipy import stats

from rosa.comparison.plan import BASE, Comparison

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """A quantity over seeds: mean, sample standard deviation, and half the width of the mean's 95 % interval
    (Student's t); NaN where one seed leaves them open."""

    mean: float
    deviation: float
    half_width: float


class Summary(NamedTuple):
    """A row of the table.

    Attributes:
        method (str): its name.
        learning_rate (float or None): at its highest; the base has none.
        trainable (float): share of all parameters, in percent.
        tasks (dict): accuracy in percent by task, a Spread; side tasks too.
        micro (Spread): accuracy in percent over all rows of the tasks, side tasks left out.
        validation_loss (Spread or None): on the held-out rows; None where none were held out.
        forgetting_loss (Spread or None): on the rows that show what was forgotten; None where none were given.
        tokens_per_second (float or None): of training; None where no GPU ran it, or none of its processes had a step
            to make.
        peak_bytes (int or None): the greatest memory taken in training; None where no GPU ran it.
        finished (int): seeds that reached the test.
        diverged (int): seeds whose loss was no longer finite.
        difference (Spread or None): in micro-average, to the best baseline, seed by seed.
        p_value (float or None): of that difference, by a paired t-test over seeds; None for baselines.
        seen (dict): by task, the share of its questions that are among the training rows, in percent, where any are.
        printed (dict): what a printed table says in this place, by task, `trainable` or `micro-average`.
    """

    method: str
    learning_rate: float | None
    trainable: float
    tasks: dict[str, Spread]
    micro: Spread
    validation_loss: Spread | None
    forgetting_loss: Spread | None
    tokens_per_second: float | None
    peak_bytes: int | None
    finished: int
    diverged: int
    difference: Spread | None
    p_value: float | None
    seen: dict[str, float]
    printed: dict[str, Decimal]


def summarise(
    comparison: Comparison, model: str, outcomes: Sequence[dict[str, Any]], averaged: Sequence[str]
) -> list[Summary]:
    """The table's rows for one model: the base as it is, and the methods in the comparison's order.

    Args:
        comparison (Comparison): it says which methods are baselines.
        model (str): one of its models.
        outcomes (sequence of dict): of all cells, as `rosa.comparison.run` returns them.
        averaged (sequence of str): the tasks of the micro-average.

    Returns:
        list of Summary: of the base and of each method that a seed of has reached the test.
    """
    cells = [o for o in outcomes if o["model"] == model and ("tasks" in o or "diverged" in o)]
    cells = [o for o in cells if o["settings"].get("seed") in (None, *comparison.seeds)]  # those that tried rates aside
    by_method = {name: [o for o in cells if o["method"] == name] for name in (BASE, *comparison.methods)}
    scores = {name: micro_by_seed(found, averaged) for name, found in by_method.items()}
    best = best_baseline({name: scores[name] for name in comparison.methods if comparison.is_baseline(name)})
    measured = [name for name in comparison.methods if not comparison.is_baseline(name)] if best else []
    return [
        _summary(
            name,
            found,
            scores[name],
            scores[best] if name in measured else None,
            comparison.printed.of(model, name, averaged),
        )
        for name, found in by_method.items()
        if scores[name]
    ]


def micro_by_seed(outcomes: Sequence[dict[str, Any]], tasks: Sequence[str]) -> dict[int, float]:
    """Micro-averaged accuracy in percent over all rows of these tasks, by seed; the base has none."""
    found = {}
    for outcome in outcomes:
        if "tasks" in outcome:
            parts = [outcome["tasks"][name] for name in tasks]
            found[outcome["settings"].get("seed")] = (
                100 * sum(p["correct"] for p in parts) / sum(p["total"] for p in parts)
            )
    return found


def best_baseline(scores: Mapping[str, Mapping[int, float]]) -> str | None:
    """The method with the highest mean over seeds; None if there is none."""
    finished = {name: by_seed for name, by_seed in scores.items() if by_seed}
    return max(finished, key=lambda name: statistics.fmean(finished[name].values())) if finished else None


def spread(values: Sequence[float]) -> Spread:
    """Mean, deviation and interval of at least one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, math.nan, math.nan)
    deviation = statistics.stdev(values)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Spread(mean, deviation, quantile * deviation / math.sqrt(len(values)))


def _spread_of(outcomes: Sequence[dict[str, Any]], name: str) -> Spread | None:
    values = [outcome[name] for outcome in outcomes if outcome.get(name) is not None]
    return spread(values) if values else None


def _summary(
    method: str,
    outcomes: Sequence[dict[str, Any]],
    micro: Mapping[int, float],
    best: Mapping[int, float] | None,
    printed: dict[str, Decimal],
) -> Summary:
    tested = [outcome for outcome in outcomes if "tasks" in outcome]
    first = tested[0]
    accuracies = {
        name: spread([100 * o["tasks"][name]["correct"] / o["tasks"][name]["total"] for o in tested])
        for name in first["tasks"]
    }
    peaks = [o["peak_bytes"] for o in tested if o.get("peak_bytes") is not None]  # none of what only resumed its end
    rates = [o["tokens_per_second"] for o in tested if o.get("tokens_per_second") is not None]
    shared = sorted(micro.keys() & best.keys()) if best is not None else []
    differences = [micro[seed] - best[seed] for seed in shared]
    return Summary(
        method=method,
        learning_rate=first.get("learning_rate"),
        trainable=100 * first["trainable"] / first["total"],
        tasks=accuracies,
        micro=spread(list(micro.values())),
        validation_loss=_spread_of(tested, "validation_loss"),
        forgetting_loss=_spread_of(tested, "forgetting_loss"),
        tokens_per_second=statistics.fmean(rates) if peaks and rates else None,
        peak_bytes=max(peaks, default=None),
        finished=len(tested),
        diverged=len(outcomes) - len(tested),
        difference=spread(differences) if shared else None,
        # The paired test: one of the differences against 0. Where they are all one, it has no answer.
        p_value=float(stats.ttest_1samp(differences, 0).pvalue) if len(set(differences)) > 1 else None,
        seen={name: share for name, share in first.get("seen", {}).items() if share and name in first["tasks"]},
        printed=printed,
    )
