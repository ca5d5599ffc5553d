"""How fast a process trains: tokens and seconds of its own steps."""

from __future__ import annotations

import time

from transformers import TrainerCallback


class Speed(TrainerCallback):
    """Counts, from the beginning of a Trainer's training or its resumption, the tokens and the seconds of its steps;
    what lies between the steps, as evaluation and checkpoints do, does not count.

    Attributes:
        tokens (int): of all ranks, as `include_num_input_tokens_seen` has the Trainer count them.
        seconds (float): spent in these steps.
    """

    def __init__(self):
        self.tokens, self.seconds = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens, self.seconds = 0, 0.0
        self._seen = state.num_input_tokens_seen  # by the processes before this one

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._start
        self.tokens = int(state.num_input_tokens_seen) - int(self._seen)
