"""What AdaLoRA of peft wants to be told while it trains."""

from __future__ import annotations

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

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_save(self, args, state, control, model, **kwargs):
        # peft cuts the model to the ranks in its configuration before it loads a checkpoint, which has its own.
        if args.load_best_model_at_end and state.global_step >= state.max_steps:
            best = peft.PeftConfig.from_pretrained(state.best_model_checkpoint)
            model.peft_config["default"].rank_pattern = best.rank_pattern
