"""AdaLoRA of peft: what it wants to be told while it trains, and what of its loss is its penalty."""

from __future__ import annotations

from typing import Any

import peft
from transformers import TrainerCallback


class AllocateRanks(TrainerCallback):
    """AdaLoRA's ranks fall during training: peft wants to know the number of steps, and each step when it is done."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        config = model.peft_config["default"]
        if state.max_steps - config.tfinal < 2:  # peft would cut the ranks by what it has not measured yet
            raise ValueError(f"AdaLoRA needs at least {config.tfinal + 2} steps, and the run has {state.max_steps}")
        config.total_step = state.max_steps
        model.base_model.rankallocator.set_total_step(state.max_steps)
        model.base_model.share = 1 / (args.gradient_accumulation_steps * args.world_size)

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_save(self, args, state, control, model, **kwargs):
        # peft cuts the model to the ranks in its configuration before it loads a checkpoint, which has its own.
        if args.load_best_model_at_end and state.global_step >= state.max_steps:
            best = peft.PeftConfig.from_pretrained(state.best_model_checkpoint)
            model.peft_config["default"].rank_pattern = best.rank_pattern


class SparingAdaLora(peft.AdaLoraModel):
    """AdaLoRA whose penalty on singular vectors is a matter of training alone, and there of steps.

    peft adds it to the loss in evaluation too, where it says nothing of the model and is many times the loss of the
    answers; an adapter that was loaded to be used fails over it. In training it adds all of it to each pass, while
    Trainer has the losses of a step's passes, on all processes, add up to the step's.

    Attributes:
        share (float): of the penalty that a pass adds: 1 by the number of passes of a step.
    """

    share = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.model(*args, **kwargs)
        config = self.peft_config[self.trainable_adapter_name]
        weight = config.orth_reg_weight
        config.orth_reg_weight = weight * self.share
        try:
            return super().forward(*args, **kwargs)
        finally:
            config.orth_reg_weight = weight


def spare_evaluation(model: peft.PeftModel) -> None:
    """Has a model to which peft gave AdaLoRA leave the penalty out of its loss while it is evaluated."""
    model.base_model.__class__ = SparingAdaLora
