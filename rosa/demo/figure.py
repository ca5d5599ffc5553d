"""The demo's picture: loss curves of RoSA and LoRA, and below them the layers that layer selection trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rosa.inspection.figures import draw_selections
from rosa.selection.algorithm import Selection

LINE_COLOURS = {"RoSA": "#0072B2", "LoRA": "#D55E00"}
SMOOTHING = 10


def draw_figure(
    losses: Mapping[str, Mapping[int, float]], history: Sequence[Selection], num_layers: int, path: Path
) -> None:
    """Write the picture as a PNG.

    Args:
        losses (mapping): "RoSA" and "LoRA" to the loss by step.
        history (sequence of Selection): RoSA's selections, in the order of their steps.
        num_layers (int): the decoder layers.
        path (Path): the file to write.
    """
    # Figure, not pyplot: no display and no global state.
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_losses(upper, losses)
    draw_selections(lower, history, range(num_layers), max(losses["RoSA"]))
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, losses: Mapping[str, Mapping[int, float]]) -> None:
    for name, by_step in losses.items():
        steps, values = list(by_step), list(by_step.values())
        axes.plot(steps, values, color=LINE_COLOURS[name], linewidth=0.8, alpha=0.3)
        axes.plot(steps, _running_mean(values), color=LINE_COLOURS[name], linewidth=2, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.set_title(f"Training loss (thick: mean of {SMOOTHING} steps)", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _running_mean(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
