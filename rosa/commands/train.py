"""`rosa train`: fine-tune a model."""

from __future__ import annotations

import torch
from transformers import HfArgumentParser, TrainingArguments

from rosa.finetune import TRAINING_DEFAULTS, FinetuneArguments, finetune


def run(argv: list[str]) -> None:
    """Run `rosa train ...`."""
    parser = HfArgumentParser(
        [FinetuneArguments, TrainingArguments],
        prog="rosa train",
        usage="rosa train --model MODEL --data DATA --output FOLDER [options]",
        description="Fine-tune a model with RoSA. Takes every field of transformers' TrainingArguments too.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", dest="output_dir", help="folder for the adapter, the tokenizer and the checkpoints")
    # None: decided below, by what else was given.
    automatic = ("output_dir", "bf16", "dataloader_pin_memory", "eval_strategy", "include_num_input_tokens_seen")
    parser.set_defaults(**TRAINING_DEFAULTS, **dict.fromkeys(automatic))
    given = vars(parser.parse_args(argv))
    if given["output_dir"] is None:
        parser.error("the following arguments are required: --output")
    if given["resume_from_checkpoint"] is not None:
        parser.error("--resume takes the place of --resume_from_checkpoint")
    finetune(*parser.parse_dict(given | _automatic(given)))


def _automatic(given: dict) -> dict:
    """The training arguments that were left open, by what was given and what is there."""
    gpu = torch.cuda.is_available() and not given["use_cpu"]
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    choices = {
        "bf16": has_bf16 and not given["fp16"],
        "dataloader_pin_memory": gpu,
        "eval_strategy": "epoch" if given["val_size"] else "no",
        # Trainer then logs tokens per second. (HfArgumentParser takes this field for a boolean.)
        "include_num_input_tokens_seen": "non_padding",
    }
    return {name: value for name, value in choices.items() if given[name] is None}
