"""The course of layer selection, read from the folder of a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from rosa.adapters.card import PAPERS
from rosa.adapters.folder import read_description
from rosa.selection.algorithm import Selection
from rosa.selection.log import read_entry
from rosa.storage.parsing import parse_object
from rosa.training.resuming import last_checkpoint


@dataclass(frozen=True)
class Course:
    """What layer selection did in a run.

    Attributes:
        layers (tuple of int): the decoder layers that took part; the scores of a selection follow their order.
        steps (int): optimizer steps of the run so far.
        history (list of Selection): all selections, by the Trainer's steps.
    """

    layers: tuple[int, ...]
    steps: int
    history: list[Selection]

    def counts(self) -> dict[int, tuple[int, int]]:
        """How many times each layer was chosen: (by score, at random)."""
        return {layer: (self._times(layer, True), self._times(layer, False)) for layer in self.layers}

    def _times(self, layer: int, exploited: bool) -> int:
        return sum(made.exploited == exploited and layer in made.layers for made in self.history)


def read_course(folder: str | os.PathLike) -> Course:
    """Read a run's layer selections from its log: that of the folder's `trainer_state.json` or, of a run that has not
    ended, that of its last complete checkpoint.

    Args:
        folder (path): the output folder of RosaTrainer, SelectiveTrainer or `rosa train`.

    Raises:
        FileNotFoundError: there is no such folder, or neither a log nor a complete checkpoint in it.
        ValueError: the log cannot be read, or holds no layer selection.
    """
    path = _log_of(Path(folder))
    try:
        state = parse_object(path.read_bytes())
        entries, steps = state["log_history"], int(state["global_step"])
        selections = [found for entry in entries if (found := read_entry(dict(entry))) is not None]
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not the state of a Trainer: {type(error).__name__}: {error}") from error
    if not selections:
        raise ValueError(f"{path} logs no layer selection in {steps} steps: {_why_none(path.parent)}")
    if len({layers for _, layers in selections}) > 1:
        raise ValueError(
            f"{path} logs selections among other layers at one step than at another: it is of several runs"
        )
    return Course(selections[-1][1], steps, [made for made, _ in selections])


def _why_none(folder: Path) -> str:
    """What a run without selections trained, and why there are none."""
    try:
        description = read_description(folder)
    except (OSError, ValueError):  # of a run that a library's own Trainer saved, say
        description = {}
    method = str(description.get("peft_type") or description.get("method") or "rosa")
    if method != "rosa":
        title = PAPERS[method].title if method in PAPERS else method
        return f"the run trained {title}, which has no layer selection unless --dls true asks for it"
    return (
        "the run trained without it (--dls false, dls=None), or ended before the first one (see --dls_interval and "
        "--dls_warmup_steps)"
    )


def _log_of(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / TRAINER_STATE_NAME).is_file():
        return folder / TRAINER_STATE_NAME
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} holds neither {TRAINER_STATE_NAME} nor a complete checkpoint of a run")
    return Path(checkpoint) / TRAINER_STATE_NAME
