"""Short training runs for bases and for the demo: transformers' Trainer on the CPU, a progress bar, losses, times."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rosa.data.tokens import tokenize


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the learning rate falls linearly to zero."""

    steps: int
    batch_size: int
    learning_rate: float


class StepRecorder(TrainerCallback):
    """Shows a progress bar and keeps what it saw.

    Attributes:
        losses (dict of int to float): the loss by step, from 1.
        seconds (list of float): the time from the start of each step's forward to the end of its optimizer step.
    """

    def __init__(self, name: str):
        self.name = name
        self.losses: dict[int, float] = {}
        self.seconds: list[float] = []

    @property
    def median_ms(self) -> float:
        """The median time of a step, in milliseconds."""
        return 1000 * statistics.median(self.seconds)

    @property
    def final_loss(self) -> float:
        """The mean loss of the last 20 steps."""
        return statistics.fmean(list(self.losses.values())[-20:])

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(total=state.max_steps, desc=self.name, unit="step")

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._start)
        self._bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses[state.global_step] = float(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


def train(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    schedule: Schedule,
    seed: int,
    trainer_class: type[Trainer] = Trainer,
    **trainer_arguments: object,
) -> tuple[Trainer, StepRecorder]:
    """Train a model in place on rows of instruction data.

    Args:
        name (str): stands before the progress bar.
        model (PreTrainedModel): the model; those of its parameters that require gradients are trained.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        rows (sequence of dict): instruction, input, output.
        schedule (Schedule): steps, batch size and learning rate.
        seed (int): the same seed gives the same batches, whatever the model.
        trainer_class (type): Trainer, or a class derived from it.
        **trainer_arguments: further arguments for it.

    Returns:
        tuple: the trainer, and the record of its steps.
    """
    recorder = StepRecorder(name)
    # Trainer makes its output folder even if it saves nothing there.
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            _arguments(schedule, seed, folder),
            train_dataset=tokenize(rows, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[recorder],
            **trainer_arguments,
        )
        trainer.remove_callback(PrinterCallback)
        # Adapters have drawn different numbers by now; the batches are to be the same.
        set_seed(seed)
        trainer.train()
    return trainer, recorder


def _arguments(schedule: Schedule, seed: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.05,  # below 1: a share of all steps
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
