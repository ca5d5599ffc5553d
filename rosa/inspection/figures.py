"""The pictures of inspection, each a PNG with its numbers beside it, in a CSV of the same name."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from rosa.inspection.activations import STATES, EnergyShare, LayerActivations
from rosa.inspection.course import Course
from rosa.selection.algorithm import Selection

# Okabe and Ito's colours, which colour-blind readers tell apart, and greys.
COLOURS = {"queries": "#0072B2", "keys": "#D55E00"}
MARKERS = {"queries": "o", "keys": "s"}
NEUTRAL, REFERENCE = "#c9cdd2", "#555555"
# What a layer did from one selection to the next.
BY_SCORE, AT_RANDOM, ALL_LAYERS, FROZEN = "#0072B2", "#E69F00", NEUTRAL, "white"
TITLE = dict(loc="left", fontsize=11)
LARGEST_GAP = 40  # layers, up to which a line parts them


def draw_head_dimensions(layers: Sequence[LayerActivations], path: Path) -> None:
    """Activation strength across head dimensions (the paper's Figure 1), queries above keys: on the left as the model
    lays a head out, on the right by rotary pair, the low frequencies last. The line is the mean of the layers, the band
    reaches from the weakest to the strongest; heads of another width have a line of their own.

    Args:
        layers (sequence of LayerActivations): what `measure` returns.
        path (Path): the PNG to write.
    """
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", squeeze=False)
    for row, states in zip(panels, STATES, strict=True):
        having = [one for one in layers if states in one.squares]
        _draw_norms(row[0], [one.norms(states) for one in having], states)
        _draw_norms(row[1], [one.norms(states)[one.by_pair] for one in having], states, elements=2)
        row[0].set_ylabel(f"{states}\nL2 norm / √tokens")
    panels[0, 0].set_title("In the model's own layout", **TITLE)
    panels[0, 1].set_title("By rotary pair, high to low frequency", **TITLE)
    panels[1, 0].set_xlabel("head dimension")
    panels[1, 1].set_xlabel("rotary pair (lowest frequency on the right)")
    _save(
        figure, path, ("layer", "attention", "states", "dimension", "pair", "norm"),
        (
            (one.layer, one.attention, states, dimension, pair, norm)
            for one in layers
            for states in one.squares
            for dimension, (pair, norm) in enumerate(zip(_pairs(one), one.norms(states).tolist(), strict=True))
        ),
    )  # fmt: skip


def draw_layers(layers: Sequence[LayerActivations], path: Path) -> None:
    """Activation strength across layers: the mean over the head dimensions, of queries and of keys.

    Args:
        layers (sequence of LayerActivations): what `measure` returns.
        path (Path): the PNG to write.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    means = {
        states: [(one.layer, one.norms(states).mean().item()) for one in layers if states in one.squares]
        for states in STATES
    }
    for states, points in means.items():
        _draw_line(axes, points, states)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("mean L2 norm / √tokens")
    axes.set_ylim(bottom=0)
    axes.set_title("Rotated queries and keys, mean of the head dimensions", **TITLE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    rows = ((layer, states, mean) for states, points in means.items() for layer, mean in points)
    _save(figure, path, ("layer", "states", "mean_norm"), rows)


def draw_energy_shares(shares: Sequence[EnergyShare], path: Path) -> None:
    """The share of energy in the last r_low of the rotary pairs against r_low, beside that of evenly spread energy; a
    thin line for each layer's queries and keys together.

    Args:
        shares (sequence of EnergyShare): what `energy_shares` returns.
        path (Path): the PNG to write.
    """
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    together = [share for share in shares if share.layer is None]
    r_lows = [share.r_low for share in together]
    for position in range(1, len(shares) // len(r_lows)):
        every = shares[position :: len(shares) // len(r_lows)]
        label = "a layer's queries and keys" if position == 1 else None
        axes.plot(r_lows, [share.both for share in every], color=NEUTRAL, linewidth=1, label=label)
    for states in STATES:
        points = [(share.r_low, value) for share in together if (value := getattr(share, states)) is not None]
        _draw_line(axes, points, states)
    axes.plot(r_lows, [share.uniform for share in together], "--", color=REFERENCE, label="if spread evenly")
    axes.set_xlabel("r_low: share of the rotary pairs, from the lowest frequency")
    axes.set_ylabel("share of activation energy")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("Energy in the low-frequency pairs", **TITLE)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    rows = (("all" if share.layer is None else share.layer, *share[1:]) for share in shares)
    _save(figure, path, EnergyShare._fields, rows)


def draw_course(course: Course, path: Path) -> None:
    """Layer selection over a run: which layers trained when, chosen by score or at random, and how often each was;
    the counts stand in a second CSV, whose name ends in `_counts`.

    Args:
        course (Course): what `read_course` returns.
        path (Path): the PNG to write.
    """
    figure = Figure(figsize=(8, _height(course.layers)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    draw_selections(left, course.history, course.layers, course.steps)
    counts = course.counts()
    by_score, at_random = zip(*counts.values(), strict=True)
    places = range(len(counts))
    right.barh(places, by_score, color=BY_SCORE)
    right.barh(places, at_random, left=by_score, color=AT_RANDOM)
    right.set_xlabel("times chosen")
    right.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    right.set_title(f"of {len(course.history)} selections", **TITLE)
    _save(
        figure, path, ("step", "layer", "selected", "by_score"),
        (
            (made.step, layer, int(layer in made.layers), int(made.exploited))
            for made in course.history
            for layer in course.layers
        ),
    )  # fmt: skip
    rows = ((layer, *pair, sum(pair)) for layer, pair in counts.items())
    _write_table(path.with_name(f"{path.stem}_counts.csv"), ("layer", "by_score", "at_random", "total"), rows)


def draw_scores(course: Course, path: Path) -> None:
    """The score of every layer at each selection, as a heat map; each holds until the next.

    Args:
        course (Course): what `read_course` returns.
        path (Path): the PNG to write.
    """
    figure = Figure(figsize=(8, _height(course.layers)), layout="constrained")
    axes = figure.subplots()
    scores = list(zip(*(made.scores for made in course.history), strict=True))
    edges = _edges([*(made.step for made in course.history), course.steps + 1], course.layers)
    norm = "log" if any(map(any, scores)) else "linear"  # a score of 0 stays white
    figure.colorbar(axes.pcolormesh(*edges, scores, cmap="cividis", norm=norm), ax=axes, label="score (gradient norm)")
    _label(axes, course.layers)
    axes.set_title("Layer scores, from one selection to the next", **TITLE)
    _save(
        figure, path, ("step", "layer", "score"),
        (
            (made.step, layer, score)
            for made in course.history
            for layer, score in zip(course.layers, made.scores, strict=True)
        ),
    )  # fmt: skip


def draw_k_ratio(points: Iterable[tuple[float, float, float]], path: Path) -> None:
    """Sensitivity to k_ratio: accuracy against the share of the layers that is selected.

    Args:
        points (iterable): rows (k_ratio, mean accuracy, half-width of its interval), accuracies in percent.
        path (Path): the PNG to write.

    Raises:
        ValueError: there are no points.
    """
    rows = sorted(points)
    if not rows:
        raise ValueError("there are no points of k_ratio to draw")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    ratios, means, halves = zip(*rows, strict=True)
    axes.errorbar(ratios, means, yerr=halves, color=BY_SCORE, marker="o", linewidth=2, capsize=5)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("k_ratio: share of the layers that is selected")
    axes.set_ylabel("accuracy (%)")
    axes.set_title("Sensitivity to k_ratio", **TITLE)
    axes.grid(alpha=0.3)
    _save(figure, path, ("k_ratio", "accuracy", "half_width"), rows)


def draw_selections(axes: Axes, history: Sequence[Selection], layers: Sequence[int], steps: int) -> None:
    """Draw which layers trained at which step.

    Args:
        axes (Axes): where to draw.
        history (sequence of Selection): in the order of their steps.
        layers (sequence of int): the decoder layers that took part.
        steps (int): the run's steps.
    """
    # The selection of step t masks step t already, and holds until the step before the next.
    starts = [1, *(made.step for made in history), steps + 1]
    kinds = [[ALL_LAYERS] * len(layers)]
    kinds += [[_kind(made, layer) for layer in layers] for made in history]
    colours = [FROZEN, ALL_LAYERS, BY_SCORE, AT_RANDOM]
    cells = [[colours.index(kind) for kind in row] for row in zip(*kinds, strict=True)]
    axes.pcolormesh(*_edges(starts, layers), cells, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1)
    if len(layers) <= LARGEST_GAP:
        axes.hlines([place + 0.5 for place in range(len(layers) - 1)], 0.5, steps + 0.5, "white", linewidth=2)
    _label(axes, layers)
    axes.set_title("Decoder layers that trained", **TITLE)
    names = {"all": ALL_LAYERS, "chosen by score": BY_SCORE, "at random": AT_RANDOM}
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)


def _kind(made: Selection, layer: int) -> str:
    if layer not in made.layers:
        return FROZEN
    return BY_SCORE if made.exploited else AT_RANDOM


def _edges(starts: Sequence[int], layers: Sequence[int]) -> tuple[list[float], list[float]]:
    """The edges of the cells of a map of layers over steps."""
    return [start - 0.5 for start in starts], [place - 0.5 for place in range(len(layers) + 1)]


def _label(axes: Axes, layers: Sequence[int]) -> None:
    """Labels a map of layers over steps."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    every = -(-len(layers) // 16)  # labels that do not touch
    axes.set_yticks(range(0, len(layers), every), layers[::every])
    axes.set_ylabel("decoder layer")


def _height(layers: Sequence[int]) -> float:
    """Inches for a map of so many layers."""
    return min(6.5, 2.4 + 0.16 * len(layers))


def _draw_line(axes: Axes, points: Sequence[tuple[float, float]], states: str) -> None:
    if points:
        style = dict(color=COLOURS[states], marker=MARKERS[states], markersize=5, linewidth=2)
        axes.plot(*zip(*points, strict=True), **style, label=states)


def _draw_norms(axes: Axes, norms: Sequence[Tensor], states: str, elements: int = 1) -> None:
    """Mean and range of the layers, with so many elements of a head to a unit of the x axis."""
    for width in dict.fromkeys(len(one) for one in norms):
        alike = torch.stack([one for one in norms if len(one) == width])
        places = torch.arange(width) / elements
        axes.fill_between(places, alike.amin(0), alike.amax(0), color=COLOURS[states], alpha=0.2, linewidth=0)
        axes.plot(places, alike.mean(0), color=COLOURS[states], linewidth=2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _pairs(one: LayerActivations) -> list[int | None]:
    """The rotary pair that each element of a head belongs to, None for those that are not rotated."""
    pairs: list[int | None] = [None] * next(iter(one.squares.values())).shape[1]
    for place, element in enumerate(one.by_pair.tolist()):
        pairs[element] = place // 2
    return pairs


def _save(figure: Figure, path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    figure.savefig(path, dpi=150)
    _write_table(path.with_suffix(".csv"), header, rows)


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
