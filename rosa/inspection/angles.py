"""What a RoAd adapter has learned: how far it turns and scales the outputs of each linear layer."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rosa.adapters.card import PAPERS
from rosa.adapters.folder import local_folder, open_adapter
from rosa.inspection.figures import TITLE, save

_ANGLES = re.compile(r"(?:.*?\.)?(?P<layer>\d+)\.(?P<linear>.+)\.road\.theta")


class Turn(NamedTuple):
    """How far RoAd of one linear layer is from the identity, whose angles are 0 and scales 1.

    `layer` is the decoder layer's index and `linear` the name within it; `angle` and `scale` are the means of |theta|
    in radians and of |alpha - 1|, `most_angle` and `most_scale` the greatest of them.
    """

    layer: int
    linear: str
    angle: float
    most_angle: float
    scale: float
    most_scale: float


def read_turns(source: str | os.PathLike) -> list[Turn]:
    """Read the angles and scales of a RoAd adapter.

    Args:
        source (path or str): a folder that `rosa.save_adapter` wrote, or a repository of the Hugging Face hub.

    Returns:
        list of Turn: by layer and name.

    Raises:
        FileNotFoundError: there is no such folder, or a file in it is missing.
        ValueError: the adapter is damaged, or of another method.
    """
    turns = []
    with open_adapter(local_folder(source)) as stored:
        method = stored.description.get("method", "rosa")
        if method != "road":
            title = PAPERS[method].title if method in PAPERS else repr(method)
            raise ValueError(
                f"the adapter in {source} is of {title}, which has no angles to show: give --model, and --text or "
                "--data, to measure queries and keys with it"
            )
        for name in stored.file.keys():  # noqa: SIM118
            match = _ANGLES.fullmatch(name)
            if match:
                angles = stored.tensor(name).float().abs()
                scales = (stored.tensor(f"{name.removesuffix('theta')}alpha").float() - 1).abs()
                numbers = (f(x).item() for x in (angles, scales) for f in (torch.mean, torch.amax))
                turns.append(Turn(int(match["layer"]), match["linear"], *numbers))
    if not turns:
        raise ValueError(f"the adapter in {source} holds no angles")
    return sorted(turns)


def turns_table(turns: Sequence[Turn]) -> str:
    """A row for each kind of linear layer: the mean and the greatest of |theta| and |alpha - 1| over all layers, and
    the layers that are turned least and most."""
    width = max(len("linear layer"), *(len(turn.linear) for turn in turns))
    lines = [
        "how far RoAd is from the identity: angles |theta| in radians, scales |alpha - 1|",
        f"{'linear layer':{width}}{'angle':>9}{'most':>9}{'scale':>9}{'most':>9}   angle, least and greatest layer",
    ]
    for linear in dict.fromkeys(turn.linear for turn in turns):
        of_kind = [turn for turn in turns if turn.linear == linear]
        angle, scale = (sum(getattr(turn, name) for turn in of_kind) / len(of_kind) for name in ("angle", "scale"))
        most_angle, most_scale = (max(getattr(t, name) for t in of_kind) for name in ("most_angle", "most_scale"))
        numbers = "".join(f"{number:9.4f}" for number in (angle, most_angle, scale, most_scale))
        ends = [pick(of_kind, key=lambda turn: turn.angle) for pick in (min, max)]
        lines.append(f"{linear:{width}}{numbers}" + "".join(f"{end.angle:9.4f} (layer {end.layer})" for end in ends))
    return "\n".join(lines)


def draw_turns(turns: Sequence[Turn], path: Path) -> None:
    """The mean angle and the mean distance of the scale from 1, by layer and kind of linear layer, as two heat maps.

    Args:
        turns (sequence of Turn): what `read_turns` returns.
        path (Path): the PNG to write; the numbers stand beside it.
    """
    linears, layers = list(dict.fromkeys(turn.linear for turn in turns)), sorted({turn.layer for turn in turns})
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(linears)), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name, title in zip(panels, ("angle", "scale"), ("|theta|, radians", "|alpha - 1|"), strict=True):
        known = {(turn.linear, turn.layer): getattr(turn, name) for turn in turns}
        cells = [[known.get((linear, layer), float("nan")) for layer in layers] for linear in linears]
        image = axes.pcolormesh(layers, range(len(linears)), cells, cmap="cividis", vmin=0, shading="nearest")
        figure.colorbar(image, ax=axes)
        axes.set_yticks(range(len(linears)), linears)
        axes.invert_yaxis()  # as the table has them
        axes.set_title(f"Mean {title}", **TITLE)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("decoder layer")
    save(figure, path, Turn._fields, turns)
