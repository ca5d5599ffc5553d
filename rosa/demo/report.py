"""The demo's report as text. Every function takes measured figures and returns a section to print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from rosa.demo.methods import FineTuned

QUICK_NOTE = (
    "This is the quick form: it shows that everything runs. Training is cut so short that its figures mean little;\n"
    "`rosa demo` without --quick takes some minutes and is the one to read."
)


@dataclass(frozen=True)
class Accuracy:
    """Exact-match accuracy on held-out problems, in percent."""

    seen: float
    unseen: float


def base_section(model: PreTrainedModel, origin: str, accuracy: Accuracy, held_out: int) -> str:
    """What the base model is, where it came from and what it can do."""
    layers, hidden_size = model.config.num_hidden_layers, model.config.hidden_size
    return f"""
Base model: Qwen2 architecture, {layers} layers, hidden size {hidden_size}, {model.num_parameters():,} parameters,
{origin}.

{_row(f"exact match on {held_out} held-out problems", "base")}
{_row("  kinds of problem it was trained on", _percent(accuracy.seen))}
{_row("  a kind it has not seen", _percent(accuracy.unseen))}"""


def fine_tuning_section(rows: Sequence[dict], steps: int, batch_size: int) -> str:
    """What both methods are trained on."""
    return f"""
Fine-tuning on {len(rows):,} problems of the unseen kind, {steps} steps of {batch_size}, the same for both methods:
  {rows[0]["instruction"]}
  {rows[0]["output"]}"""


def comparison_section(
    before: Accuracy, rosa: FineTuned, rosa_after: Accuracy, lora: FineTuned, lora_after: Accuracy
) -> str:
    """RoSA beside LoRA."""
    both, after = (rosa, lora), (rosa_after, lora_after)
    return f"""
{_row("", "RoSA", "LoRA")}
{_row("rank", *(str(method.rank) for method in both))}
{_row("learning rate", *(f"{method.learning_rate:g}" for method in both))}
{_row("trainable parameters", *(f"{method.trainable:,}" for method in both))}
{_row("  share of all", *(f"{method.percent:.2f} %" for method in both))}
{_row("exact match, unseen kind: before", *[_percent(before.unseen)] * 2)}
{_row("                          after", *(_percent(accuracy.unseen) for accuracy in after))}
{_row("exact match, seen kinds:  before", *[_percent(before.seen)] * 2)}
{_row("                          after", *(_percent(accuracy.seen) for accuracy in after))}
{_row("loss, mean of the last 20 steps", *(f"{method.recorder.final_loss:.4f}" for method in both))}
{_row("time per step, median", *(f"{method.recorder.median_ms:.0f} ms" for method in both))}

LoRA is peft's, on all linear layers, with the rank that brings it nearest to RoSA's trainable parameters. RoSA's rank
is {rosa.rank} instead of the paper's 128, as the model is so small. Neither was shown the seen kinds again. The times
are the CPU's and say nothing about a GPU."""


def command_section(command: Sequence[str], output: str, problem: dict, base_output: str) -> str:
    """A command line that was run and what it printed, beside the right answer and the base model's."""
    return f"""
From the command line:
  {shlex.join(command)}
  {output}

  right answer:           {problem["output"]}
  answer of the base:     {base_output}"""


def _row(label: str, *columns: str) -> str:
    return f"{label:40}" + "".join(f"{column:>12}" for column in columns)


def _percent(value: float) -> str:
    return f"{value:.1f} %"
