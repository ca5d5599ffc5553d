"""The training job behind `rosa train`: data and a model in, an adapter out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rosa.adapters.card import PAPERS
from rosa.adapters.folder import remove_adapter
from rosa.adapters.pretrained import load_model
from rosa.data.prompt_form import save_form
from rosa.storage.locking import alone_in
from rosa.training.finetune_arguments import FinetuneArguments
from rosa.training.job_data import prepare
from rosa.training.methods import OURS, attach, callbacks, resumes, trainable
from rosa.training.padding import epoch_padding
from rosa.training.padding_free import RowsApart, flattening
from rosa.training.preflight import check, starting_point
from rosa.training.resuming import changes, checkpoints, last_checkpoint, made_with, unsaved_told
from rosa.training.selective_trainer import SelectiveTrainer
from rosa.training.trainer import RosaTrainer
from rosa.training.watching import PICTURE_NAME, Watch


def finetune(job: FinetuneArguments, args: TrainingArguments) -> SelectiveTrainer:
    """Train an adapter and save it, with the tokenizer and the course of training, in `args.output_dir`.

    An earlier adapter there goes, if `job.overwrite` says so, only when the data, the model and all settings have been
    found valid and the first step is about to run. From then on no other process may train there.

    Args:
        job (FinetuneArguments): the model, the data, the method and what RoSA adds.
        args (TrainingArguments): everything else about the run.

    Returns:
        SelectiveTrainer: with the trained model, and the log of the run.

    Raises:
        ValueError, OSError: the data, the model, the configuration or the state of the folder is at fault, or a package
            is missing.
        FloatingPointError: the loss or a parameter is no longer finite.
        KeyboardInterrupt: as it came; its text says which checkpoint stands.
    """
    with _checkpoint_told(Path(args.output_dir)):
        return _finetune(job, args)


def _finetune(job: FinetuneArguments, args: TrainingArguments) -> SelectiveTrainer:
    _take_one_gpu(args)
    output = Path(args.output_dir)
    checkpoint = starting_point(output, resume=job.resume, overwrite=job.overwrite)
    if checkpoint is not None and not resumes(job.method):
        raise ValueError(f"{job.method} cannot go on from {checkpoint}, which lacks its state: --overwrite starts anew")
    check(job, args)
    data = prepare(job, args)
    if args.process_index == 0:
        print(data.summary)
    made = made_with(job, args, data.identity()) if args.should_save else None  # by one process: it reads all of it
    if job.resume and made is not None:
        _tell_start(output, checkpoint, changes(checkpoint, made) if checkpoint else None)

    set_seed(args.seed)  # before the adapter draws its first weights
    base = load_model(job.model, load_in=job.load_in, attn_implementation=job.attn_implementation)
    model = attach(base, job.method, config=job.config, settings=job.peft_settings)
    collator = flattening(model) if job.padding_free else DataCollatorForSeq2Seq(data.tokenizer)
    checks = [RowsApart(collator)] if job.padding_free else []
    trainer_class = RosaTrainer if job.method in OURS else SelectiveTrainer
    with ExitStack() as lock:
        trainer = trainer_class(
            model,
            args,
            dls=job.layer_selection(args.seed),
            norm_learning_rate=job.norm_learning_rate,
            response_logits=job.response_logits,
            made_with=made,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=collator,
            processing_class=data.tokenizer,
            callbacks=[
                *callbacks(job.method),
                *checks,
                _TakeOutput(job, checkpoint, lock),
                _KeepPromptForm(data.form.prompts),
            ],
        )
        for theirs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(theirs)
        trainer.add_callback(Watch(trainer))
        if trainer.is_world_process_zero():
            number, total = trainable(model)
            print(_plan(job, args))
            print(f"trainable params: {number:,} || all params: {total:,} || trainable%: {100 * number / total:.4f}")
            if not job.streaming:
                print(f"padding: {epoch_padding(trainer):.1%} of the tokens{', left out' if job.padding_free else ''}")
        set_seed(args.seed)  # methods have drawn different numbers by now; batches and dropout are to be the same
        trainer.train(resume_from_checkpoint=checkpoint)
        with unsaved_told(output, output):
            if args.should_save:
                save_form(output, data.form.prompts)  # before the adapter: nobody is to read that without it
            trainer.save_model()
            trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"adapter saved in {output}")
    return trainer


def _take_one_gpu(args: TrainingArguments) -> None:
    """Where one process sees several GPUs, Trainer would give each as many rows a step as were asked for in all."""
    if args.n_gpu > 1:
        print(f"of {args.n_gpu} GPUs this process takes the first: `torchrun --nproc-per-node {args.n_gpu}` takes all")
        args._n_gpu = 1


def _plan(job: FinetuneArguments, args: TrainingArguments) -> str:
    """The method and the size of a run, in a line."""
    title = PAPERS[job.method].title if job.method in PAPERS else job.method
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return f"{title}: {length}, {rows} rows a step, learning rate {args.learning_rate:g}"


def _tell_start(output: Path, checkpoint: str | None, changed: str | None) -> None:
    if checkpoint is None:
        # The same command line serves a job's first start and its restarts, even before the first checkpoint.
        print(f"no complete checkpoint in {output}: starting from the beginning")
        return
    print(f"resuming from {checkpoint}")
    if changed is not None:
        print(f"since then {changed}")


class _TakeOutput(TrainerCallback):
    """Takes the output folder for this process alone once all is ready to train, and deletes there what an earlier run
    left, and nothing else: its log and its picture, which would pass for those of this run, and if it is to be
    overwritten its adapter and checkpoints.

    Args:
        job (FinetuneArguments): whether to resume or to overwrite.
        checkpoint (str or None): where training begins, as it was found before the folder was taken.
        lock (ExitStack): keeps the folder until it is closed.
    """

    def __init__(self, job: FinetuneArguments, checkpoint: str | None, lock: ExitStack):
        self.job, self.checkpoint, self.lock = job, checkpoint, lock

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step > state.max_steps:
            raise ValueError(f"{self.checkpoint} is past the {state.max_steps} steps that are asked for")
        if not args.should_save:
            return
        output = Path(args.output_dir)
        self.lock.enter_context(alone_in(output))
        if starting_point(output, resume=self.job.resume, overwrite=self.job.overwrite) != self.checkpoint:
            raise ValueError(f"another process has trained in {output} since this one began: start it again")
        if state.global_step == state.max_steps:
            print(f"{self.checkpoint} has all {state.max_steps} steps: nothing is left to train")
        for of_earlier_run in (TRAINER_STATE_NAME, PICTURE_NAME):
            (output / of_earlier_run).unlink(missing_ok=True)
        if self.job.overwrite:
            remove_adapter(output)
        for checkpoint in checkpoints(output) if self.job.overwrite else []:
            shutil.rmtree(checkpoint)


class _KeepPromptForm(TrainerCallback):
    """Writes into every checkpoint how prompts are written."""

    def __init__(self, form: str):
        self.form = form

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.should_save:
            save_form(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", self.form)


@contextmanager
def _checkpoint_told(output: Path) -> Iterator[None]:
    """Has an interrupted run say what is left of it."""
    try:
        yield
    except KeyboardInterrupt:
        stands = last_checkpoint(output)
        text = "no checkpoint was saved yet" if stands is None else f"{stands} stands: --resume goes on from it"
        raise KeyboardInterrupt(text) from None
