"""The demo's picture: loss curves of RoSA and LoRA, and below them the layers that layer selection trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rosa.selection import Selection

LINE_COLOURS = {"RoSA": "#1f5fa8", "LoRA": "#d9822b"}
ALL_LAYERS, BY_SCORE, AT_RANDOM = "#c9cdd2", "#1f5fa8", "#8fb8e0"
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
    _draw_selections(lower, history, num_layers, max(losses["RoSA"]))
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


def _draw_selections(axes: Axes, history: Sequence[Selection], num_layers: int, steps: int) -> None:
    # The selection of step t masks step t already, and holds until the step before the next.
    starts = [1, *(selection.step for selection in history), steps + 1]
    chosen = [(tuple(range(num_layers)), ALL_LAYERS)]
    chosen += [(selection.layers, BY_SCORE if selection.exploited else AT_RANDOM) for selection in history]
    for (layers, colour), start, end in zip(chosen, starts[:-1], starts[1:], strict=True):
        for layer in layers:
            axes.broken_barh([(start - 0.5, end - start)], (layer - 0.4, 0.8), color=colour, linewidth=0)
    axes.set_yticks(range(num_layers))
    axes.set_ylabel("layer")
    axes.set_xlabel("step")
    axes.set_xlim(0.5, steps + 0.5)
    axes.set_title("Decoder layers that RoSA trained", loc="left", fontsize=11)
    names = {"all": ALL_LAYERS, "chosen by score": BY_SCORE, "chosen at random": AT_RANDOM}
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)


def _running_mean(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
