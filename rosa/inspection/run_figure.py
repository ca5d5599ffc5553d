"""The course of a training run in one picture: loss, learning rate, and the layers that trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rosa.inspection.figures import AT_RANDOM, BY_SCORE, REFERENCE, TITLE, draw_selections
from rosa.selection.log import read_entry
from rosa.training.watching import HELD_OUT, LOSS, course

RATE = "learning_rate"


def draw_run(history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws a run from its log: the loss of training and on held-out rows above the learning rate, and below them,
    where layers were selected, which trained when. The numbers are in the log itself.

    Args:
        history (sequence of dict): a Trainer's `log_history`.
        path (Path): the PNG to write.

    Returns:
        bool: False where fewer than two losses were logged, and nothing is drawn.
    """
    losses = course(history, LOSS)
    if len(losses) < 2:
        return False
    found = [entry for entry in map(read_entry, history) if entry is not None]
    heights = [2.6, 1.2] + [min(3.5, 1.2 + 0.12 * len(layers)) for _, layers in found[:1]]
    figure = Figure(figsize=(8, 1 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _line(panels[0], losses, BY_SCORE, "training", marker=None)
    if course(history, HELD_OUT):
        _line(panels[0], course(history, HELD_OUT), AT_RANDOM, "held out", marker="o")
        panels[0].legend(frameon=False)
    panels[0].set_title("Loss", **TITLE)
    _line(panels[1], course(history, RATE), REFERENCE, None, marker=None)
    panels[1].set_title("Learning rate", **TITLE)
    panels[1].set_ylim(bottom=0)
    panels[1].ticklabel_format(axis="y", scilimits=(-2, 3))
    if found:
        steps = max(entry["step"] for entry in history)
        draw_selections(panels[2], [made for made, _ in found], found[0][1], steps)
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=150)
    return True


def _line(axes: Axes, points: Sequence[tuple[int, float]], colour: str, label: str | None, marker: str | None) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=4, linewidth=1.5)
    axes.grid(alpha=0.3)
