"""The two methods that the demo compares: RoSA, and peft's LoRA with about as many trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

import rosa
from rosa.miniature.training import Schedule, StepRecorder, train

# The paper's rank is 128, for hidden sizes from 3584.
ROSA_RANK = 32
# The paper's interval is 40 steps, in runs of thousands.
SELECTION_INTERVAL = 20
# Of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1, the one with the lowest final loss, found with seed 1 (the demo's is 0).
ROSA_LEARNING_RATE = 3e-2
LORA_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model, and how it came about.

    Attributes:
        model (PreTrainedModel): the base with its trained adapter.
        trainer (Trainer): what trained it.
        recorder (StepRecorder): the loss and the time of each step.
        rank (int): the adapter's.
        learning_rate (float): at its highest.
        trainable (int): trainable parameters.
        percent (float): their share of all parameters, the adapter's included.
    """

    model: PreTrainedModel
    trainer: Trainer
    recorder: StepRecorder
    rank: int
    learning_rate: float
    trainable: int
    percent: float


def fine_tune_rosa(
    base: Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], steps: int, batch_size: int, seed: int
) -> FineTuned:
    """Fine-tune the model in the folder `base` on rows of problems with RoSA: RoAE, trained norms, layer selection."""
    set_seed(seed)
    model = rosa.patch(AutoModelForCausalLM.from_pretrained(base), rosa.RosaConfig(rank=ROSA_RANK))
    trainable, _, percent = rosa.count_parameters(model)
    schedule = Schedule(steps, batch_size, ROSA_LEARNING_RATE)
    dls = {"interval": SELECTION_INTERVAL, "seed": seed}
    trainer, recorder = train("RoSA", model, tokenizer, rows, schedule, seed, rosa.RosaTrainer, dls=dls)
    return FineTuned(model, trainer, recorder, ROSA_RANK, ROSA_LEARNING_RATE, trainable, percent)


def fine_tune_lora(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    steps: int,
    batch_size: int,
    seed: int,
    parameters: int,
) -> FineTuned:
    """The same with LoRA on all linear layers, of the rank that comes nearest to `parameters` trainable ones."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    rank = lora_rank(model, parameters)
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trainable, total = model.get_nb_trainable_parameters()
    schedule = Schedule(steps, batch_size, LORA_LEARNING_RATE)
    trainer, recorder = train("LoRA", model, tokenizer, rows, schedule, seed)
    return FineTuned(model, trainer, recorder, rank, LORA_LEARNING_RATE, trainable, 100 * trainable / total)


def lora_rank(model: PreTrainedModel, parameters: int) -> int:
    """The rank at which LoRA on all linear layers, the output layer excepted, has about this many parameters."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in linears)))
