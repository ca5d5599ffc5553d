"""The training job behind `rosa train`: instruction data and a model in, an adapter out."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from rosa.adapter import CONFIG_NAME, WEIGHTS_NAME, has_adapter, save_adapter
from rosa.config import ADAPTER_DTYPES, RosaConfig
from rosa.data import load_rows, tokenize
from rosa.patching import patch, print_trainable_parameters
from rosa.trainer import RosaTrainer, last_checkpoint

# Where they differ from those of TrainingArguments: the paper's, and those of the command line.
TRAINING_DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 10.0,
    "report_to": "none",
}


def _option(default: object, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class FinetuneArguments:
    """What `rosa train` takes beside transformers' TrainingArguments."""

    _argument_group_name = "RoSA"

    model: str = field(metadata={"help": "folder or Hub name of the base model"})
    data: str = field(metadata={"help": ".json or .jsonl file with instruction, input, output; or a dataset's name"})
    val_size: int = _option(0, "rows held out for evaluation (paper: 300)")
    max_length: int = _option(2048, "tokens after which a row is cut off")
    train_on_prompt: bool = _option(False, "learn the prompt too, not the response alone")
    resume: bool = _option(False, "continue from the last complete checkpoint of --output, if there is one")
    overwrite: bool = _option(False, "replace the adapter and the checkpoints in --output")

    r_low: float = _option(RosaConfig.r_low, "share of the rotary pairs that is enhanced, from the lowest frequency")
    alpha: float = _option(RosaConfig.alpha, "strength of the enhancement")
    rank: int = _option(RosaConfig.rank, "inner size of the low-rank projections")
    train_norms: bool = _option(RosaConfig.train_norms, "train the norms of the adapted layers")
    layers: list[int] | None = field(default=None, metadata={"help": "indices of the decoder layers to adapt, from 0"})
    adapter_dtype: Literal[ADAPTER_DTYPES] = _option(RosaConfig.adapter_dtype, "dtype of the adapter's parameters")

    no_dls: bool = _option(False, "train all layers at every step: no Dynamic Layer Selection")
    dls_k_ratio: float = _option(0.5, "share of the layers that is selected")
    dls_interval: int = _option(40, "steps from one selection to the next")
    dls_warmup_steps: int = _option(0, "steps before the first selection")
    dls_p_exploit: float = _option(0.8, "probability of taking the best layers instead of random ones")
    dls_mode: Literal["skip", "mask"] = _option("skip", "freeze the other layers, or drop their gradients")
    dls_seed: int = _option(2333, "seed of the selection")

    @property
    def config(self) -> RosaConfig:
        return RosaConfig(**{f.name: getattr(self, f.name) for f in fields(RosaConfig)})

    @property
    def dls(self) -> dict[str, object] | None:
        """The keyword arguments of the layer selection; None for no selection."""
        if self.no_dls:
            return None
        return {name.removeprefix("dls_"): value for name, value in vars(self).items() if name.startswith("dls_")}


def finetune(job: FinetuneArguments, args: TrainingArguments) -> None:
    """Train a RoSA adapter and save it, with the tokenizer, in `args.output_dir`.

    An earlier adapter there goes, if `job.overwrite` says so, only when the data, the model and all settings have been
    found valid and the first step is about to run.

    Args:
        job (FinetuneArguments): the model, the data, and what RoSA adds.
        args (TrainingArguments): everything else about the run.

    Raises:
        ValueError, OSError: the data, the model, the configuration or the state of the folder is at fault.
        FloatingPointError: the loss is no longer finite.
    """
    output = Path(args.output_dir)
    checkpoint = _starting_point(output, resume=job.resume, overwrite=job.overwrite)
    config = job.config
    train_rows, val_rows = _split(load_rows(job.data), job.val_size, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    train_data, val_data = (_examples(rows, tokenizer, job) for rows in (train_rows, val_rows))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    set_seed(args.seed)  # before the adapter draws its first weights
    model = patch(AutoModelForCausalLM.from_pretrained(job.model, dtype="auto"), config)
    trainer = RosaTrainer(
        model,
        args,
        dls=job.dls,
        train_dataset=train_data,
        eval_dataset=val_data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[_ClearOutput()] if job.overwrite else None,
    )
    if trainer.is_world_process_zero():
        print_trainable_parameters(model)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero() or trainer.is_fsdp_enabled:  # whose shards all ranks bring
        save_adapter(model, output)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(output)
        print(f"adapter saved in {output}")


def _examples(rows: list[dict], tokenizer: PreTrainedTokenizerBase, job: FinetuneArguments):
    if not rows:
        return None
    return tokenize(rows, tokenizer, max_length=job.max_length, train_on_prompt=job.train_on_prompt)


def _split(rows: list[dict], val_size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """The rows to train on and, drawn at random, the `val_size` rows to hold out."""
    if not 0 <= val_size < len(rows):
        raise ValueError(f"val_size must leave at least one of the {len(rows)} rows to train on, got {val_size}")
    held_out = set(random.Random(seed).sample(range(len(rows)), val_size))
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _starting_point(output: Path, *, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to continue from, or None to start anew. Refuses to write over earlier work unasked."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is not a folder")
    found = (["an adapter"] if has_adapter(output) else []) + [folder.name for folder in _checkpoints(output)]
    checkpoint = last_checkpoint(output) if resume else None
    if checkpoint is not None:
        print(f"resuming from {checkpoint}")
    elif resume and has_adapter(output):
        raise ValueError(
            f"{output} holds an adapter but no complete checkpoint to resume from; --overwrite starts anew"
        )
    elif resume:
        # The same command line serves a job's first start and its restarts, even before the first checkpoint.
        print(f"no complete checkpoint in {output}: starting from the beginning")
    elif found and not overwrite:
        raise ValueError(f"{output} already holds {', '.join(found)}: choose another, or pass --resume or --overwrite")
    return checkpoint


def _checkpoints(output: Path) -> list[Path]:
    folders = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(path for path in folders if path.is_dir())


class _ClearOutput(TrainerCallback):
    """Deletes the adapter and the checkpoints of an earlier run, and nothing else, once all is ready to train."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        output = Path(args.output_dir)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (output / name).unlink(missing_ok=True)
        for checkpoint in _checkpoints(output):
            shutil.rmtree(checkpoint)
