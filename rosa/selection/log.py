"""The course of layer selection in a Trainer's log, and so wherever the Trainer reports to (TensorBoard, W&B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback

from rosa.selection.algorithm import Selection

COUNT, SHARE, EXPLOITED = "dls/layers", "dls/share", "dls/exploited"
SELECTED, SCORE = "dls/selected/", "dls/score/"


class LogSelections(TrainerCallback):
    """Logs each selection of layers at the step it was made: `dls/layers` counts the chosen layers, `dls/share` is
    their share of those that take part, `dls/exploited` is 1 where they were chosen by score and 0 where at random, and
    of each layer N that takes part `dls/selected/N` is 1 or 0 and `dls/score/N` its score: times the scale of the loss
    where fp16 scales it and the norms do not train.

    Args:
        trainer (Trainer): its `layer_selection` is the DynamicLayerSelection, or None.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.logged = 0  # selections, those before a resumed run's checkpoint included

    def on_train_begin(self, args, state, control, **kwargs):
        self.logged = len(self.trainer.layer_selection.history) if self.trainer.layer_selection else 0

    def on_step_end(self, args, state, control, **kwargs):
        selection = self.trainer.layer_selection
        if selection is None or len(selection.history) == self.logged:
            return
        self.logged = len(selection.history)
        loss_is_due = control.should_log  # which logging would mark as done
        self.trainer.log(log_entry(selection.history[-1], selection.layers))
        control.should_log = loss_is_due


def log_entry(made: Selection, layers: tuple[int, ...]) -> dict[str, float]:
    """A selection among these layers as it is logged."""
    return {
        COUNT: len(made.layers),
        SHARE: len(made.layers) / len(layers),
        EXPLOITED: int(made.exploited),
        **{f"{SELECTED}{layer}": int(layer in made.layers) for layer in layers},
        **{f"{SCORE}{layer}": score for layer, score in zip(layers, made.scores, strict=True)},
    }


def read_entry(entry: Mapping[str, Any]) -> tuple[Selection, tuple[int, ...]] | None:
    """The inverse of `log_entry`, of an entry of a Trainer's `log_history`; None for one about something else.

    Raises:
        LookupError, TypeError, ValueError: it is damaged.
    """
    if EXPLOITED not in entry:
        return None
    # A Trainer writes its log's names in the order of the alphabet, 10 before 2, and a resumed run reads them so.
    layers = tuple(sorted(int(name.removeprefix(SELECTED)) for name in entry if name.startswith(SELECTED)))
    chosen = tuple(layer for layer in layers if entry[f"{SELECTED}{layer}"])
    scores = tuple(float(entry[f"{SCORE}{layer}"]) for layer in layers)
    return Selection(int(entry["step"]), chosen, bool(entry[EXPLOITED]), scores), layers
