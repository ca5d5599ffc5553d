"""The course of layer selection in a Trainer's log, and so wherever the Trainer reports to."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback


class LogSelections(TrainerCallback):
    """Logs each selection of layers at the step it was made.

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
        made = selection.history[-1]
        scores = {f"dls/score/{i}": score for i, score in zip(selection.layers, made.scores, strict=True)}
        loss_is_due = control.should_log  # which logging would mark as done
        self.trainer.log({"dls/layers": len(made.layers), **scores})
        control.should_log = loss_is_due
