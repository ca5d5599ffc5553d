"""What a run would stumble over, found before rows are read and weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from rosa.adapters.folder import has_adapter, refuse_model_folder
from rosa.adapters.pretrained import load_shapes, quantization_of
from rosa.storage.output import check_output
from rosa.training.finetune_arguments import FinetuneArguments
from rosa.training.methods import attach
from rosa.training.resuming import checkpoints, fault, is_finished, last_checkpoint


def check(job: FinetuneArguments, args: TrainingArguments) -> None:
    """Raises TypeError, ValueError, OSError or ImportError where the model's configuration, the method's, packages, the
    optimizer, its schedule or the hub would fail a job that is about to start."""
    if job.load_in is not None:
        quantization_of(job.model, job.load_in)
    model = None
    if not is_deepspeed_zero3_enabled():  # which would share out a model without values
        model = attach_to_shapes(job, load_shapes(job.model, attn_implementation=job.attn_implementation))
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs the package liger-kernel, which is not installed")
    for name in args.report_to:
        with _told(f"--report_to {name}", RuntimeError, ImportError, ValueError):
            for callback in get_reporting_integration_callbacks([name]):
                callback()
    if model is not None or args.optim_target_modules is None:  # these optimizers look for modules of the model
        settings = f" --optim_args {args.optim_args}" if args.optim_args else ""
        with _told(f"--optim {args.optim.value}{settings}", RuntimeError, ImportError, ValueError):
            Trainer.get_optimizer_cls_and_kwargs(args, model)
    schedule, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
    settings = f"--lr_scheduler_kwargs {given} do not fit the schedule {schedule}"
    with _told(settings if given else f"--lr_scheduler_type {schedule}", TypeError, ValueError):
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)]),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=given,
        )
    if args.push_to_hub:
        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as error:  # the HTTP client's too, whose package differs between versions of huggingface_hub
            raise ValueError(
                f"--push_to_hub: {error}. Log in with `hf auth login`, or leave it out, and push what was trained by "
                "`rosa push`"
            ) from error


def starting_point(output: Path, *, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to continue from, or None to start anew.

    Raises:
        ValueError: a run would write over earlier work unasked, or into the folder of a model, or it has nothing to go
            on from.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    check_output(output)
    refuse_model_folder(output)
    checkpoint = last_checkpoint(output) if resume else None
    if resume and checkpoint is None and has_adapter(output):
        raise ValueError(
            f"{output} holds an adapter but no complete checkpoint to resume from; --overwrite starts anew"
        )
    finished = [path for path in checkpoints(output) if is_finished(path)]
    if resume and checkpoint is None and finished:  # and not cut short by a kill, after which a job begins anew
        raise ValueError(f"training cannot go on from {finished[-1]}: {fault(finished[-1])}; --overwrite starts anew")
    found = (["an adapter"] if has_adapter(output) else []) + [folder.name for folder in checkpoints(output)]
    if found and not (resume or overwrite):
        raise ValueError(f"{output} already holds {', '.join(found)}: choose another, or pass --resume or --overwrite")
    return checkpoint


@contextmanager
def _told(option: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise ValueError(f"{option}: {error}") from error


def attach_to_shapes(job: FinetuneArguments, base: nn.Module) -> nn.Module:
    """The job's method attached to its base on the meta device.

    Raises:
        TypeError, ValueError: the method's configuration is at fault, or does not fit the base.
    """
    # BOFT reads from tables that it makes, and so these must have values.
    with nullcontext() if job.method == "boft" else torch.device("meta"):
        return attach(base, job.method, config=job.config, settings=job.peft_settings)
