"""What a run tells whoever watches it: a line for every logging step, and at its end what came of it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rosa.adapters.folder import WEIGHTS_NAME

if TYPE_CHECKING:
    from rosa.training.selective_trainer import SelectiveTrainer

PICTURE_NAME = "train.png"  # beside the adapter
LOSS, HELD_OUT = "loss", "eval_loss"  # as a Trainer logs them


class Watch(TrainerCallback):
    """Prints a line for every loss that is logged, and one for every evaluation, on the first process alone: step,
    loss, learning rate, tokens a second, the layers that train, and how long the rest will take at the pace so far, in
    80 columns. What a step costs is told after the first one already.

    Args:
        trainer (SelectiveTrainer): that it is a callback of.
    """

    def __init__(self, trainer: SelectiveTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._from = time.perf_counter(), state.global_step
        self._tokens, self._seconds = 0, 0.0  # of the steps before the last line

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == state.max_steps  # the last step, whatever logging_steps
        if state.is_world_process_zero and state.global_step == self._from + 1 and not control.should_log:
            took = time.perf_counter() - self._began
            print(f"{_place(state)}  {took:.1f} s for this step, {self._left(state)} left", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if LOSS in logs:
            parts = [f"loss {logs[LOSS]:.4f}", f"lr {logs['learning_rate']:.1e}"]
            parts += [*self._speed(), *self._layers(), f"{self._left(state)} left"]
            print("  ".join([_place(state), *parts]), flush=True)
        elif HELD_OUT in logs:
            before = [loss for _, loss in course(state.log_history, HELD_OUT)[:-1]]
            lowest = ", the lowest so far" if before and logs[HELD_OUT] < min(before) else ""
            print(f"{_place(state)}  held-out loss {logs[HELD_OUT]:.4f}{lowest}", flush=True)

    def _speed(self) -> list[str]:
        """Of the steps since the last line; nothing where tokens are not counted."""
        speed = self.trainer.speed
        tokens, seconds = speed.tokens - self._tokens, speed.seconds - self._seconds
        self._tokens, self._seconds = speed.tokens, speed.seconds
        return [f"{tokens / seconds:,.0f} tok/s"] if tokens else []

    def _layers(self) -> list[str]:
        selection = self.trainer.layer_selection
        return [] if selection is None else [f"layers {len(selection.selected_layers)}/{selection.num_layers}"]

    def _left(self, state) -> str:
        """Hours, minutes and seconds at the pace since training began or was resumed, evaluations included."""
        pace = (time.perf_counter() - self._began) / (state.global_step - self._from)
        minutes, seconds = divmod(round(pace * (state.max_steps - state.global_step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _place(state) -> str:
    return f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"


def course(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The steps and values of a quantity in a Trainer's `log_history`."""
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def summary(trainer: SelectiveTrainer, load_in: str | None = None) -> str:
    """What came of a run that has saved its adapter, and the commands that use it, in lines.

    Args:
        trainer (SelectiveTrainer): that has trained.
        load_in (str, optional): how its base was quantized.
    """
    output, history = Path(trainer.args.output_dir), trainer.state.log_history
    adapter = f"--adapter {shlex.quote(str(output))}" + ("" if load_in is None else f" --load-in {load_in}")
    lines = {
        "loss": _from_to(course(history, LOSS)),
        "held-out loss": _from_to(course(history, HELD_OUT)) + _lowest(trainer),
        "adapter": f"{output}, {_size(output)}",
        "talk to it": f"rosa chat {adapter}",
        "ask it": f'rosa generate {adapter} --instruction "..."',
    }
    return "\n".join(f"{name:<15}{text}" for name, text in lines.items() if text)


def _from_to(points: Sequence[tuple[int, float]]) -> str:
    ends = points if len(points) < 2 else (points[0], points[-1])
    return ", ".join(f"{value:.4f} at step {step}" for step, value in ends)


def _lowest(trainer: SelectiveTrainer) -> str:
    """Where the held-out loss was lowest, if not at the end, and which adapter is that of then."""
    points = course(trainer.state.log_history, HELD_OUT)
    if not points:
        return ""
    best, loss = min(points, key=lambda point: point[1])
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        return f"; the adapter is that of step {trainer.state.best_global_step}"
    if best == points[-1][0]:
        return ""
    checkpoint = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{best}"
    return f"; lowest {loss:.4f} at step {best}, {checkpoint if checkpoint.is_dir() else 'of which nothing is kept'}"


def _size(folder: Path) -> str:
    """Of an adapter's weights on disk."""
    size = (folder / WEIGHTS_NAME).stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
