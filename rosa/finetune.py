"""The training job behind `rosa train`: instruction data and a model in, an adapter out."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

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
from transformers.trainer import TRAINER_STATE_NAME

from rosa.adapter import has_adapter, remove_adapter
from rosa.data import load_rows, tokenize
from rosa.finetune_arguments import FinetuneArguments
from rosa.methods import ROSA, attach, callbacks, resumes, trainable
from rosa.selective_trainer import SelectiveTrainer
from rosa.trainer import RosaTrainer, last_checkpoint


def finetune(job: FinetuneArguments, args: TrainingArguments) -> SelectiveTrainer:
    """Train an adapter and save it, with the tokenizer and the course of training, in `args.output_dir`.

    An earlier adapter there goes, if `job.overwrite` says so, only when the data, the model and all settings have been
    found valid and the first step is about to run.

    Args:
        job (FinetuneArguments): the model, the data, the method and what RoSA adds.
        args (TrainingArguments): everything else about the run.

    Returns:
        SelectiveTrainer: with the trained model, and the log of the run.

    Raises:
        ValueError, OSError: the data, the model, the configuration or the state of the folder is at fault.
        FloatingPointError: the loss is no longer finite.
    """
    output = Path(args.output_dir)
    checkpoint = _starting_point(output, resume=job.resume, overwrite=job.overwrite)
    if checkpoint is not None and not resumes(job.method):
        raise ValueError(f"{job.method} cannot go on from {checkpoint}, which lacks its state: --overwrite starts anew")
    config, settings = job.config, job.peft_settings
    train_rows, val_rows = _split(load_rows(job.data), job.val_size, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    train_data, val_data = (_examples(rows, tokenizer, job) for rows in (train_rows, val_rows))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    set_seed(args.seed)  # before the adapter draws its first weights
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    model = attach(base, job.method, config=config, settings=settings)
    trainer_class = RosaTrainer if job.method == ROSA else SelectiveTrainer
    trainer = trainer_class(
        model,
        args,
        dls=job.layer_selection(args.seed),
        norm_learning_rate=job.norm_learning_rate,
        train_dataset=train_data,
        eval_dataset=val_data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[*callbacks(job.method), _ClearOutput(job.overwrite)],
    )
    if trainer.is_world_process_zero():
        number, total = trainable(model)
        print(f"trainable params: {number:,} || all params: {total:,} || trainable%: {100 * number / total:.4f}")
    set_seed(args.seed)  # methods have drawn different numbers by now; batches and dropout are to be the same
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"adapter saved in {output}")
    return trainer


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
    """Deletes what an earlier run left, and nothing else, once all is ready to train: its log, which would pass for
    that of this run, and if it is to be overwritten its adapter and checkpoints."""

    def __init__(self, overwrite: bool):
        self.overwrite = overwrite

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        output = Path(args.output_dir)
        (output / TRAINER_STATE_NAME).unlink(missing_ok=True)
        if self.overwrite:
            remove_adapter(output)
        for checkpoint in _checkpoints(output) if self.overwrite else []:
            shutil.rmtree(checkpoint)
