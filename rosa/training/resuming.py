"""Going on from a checkpoint: which one, whether it is whole, and whether it was made with what is asked for now."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rosa.storage.digest import base_digest, digest
from rosa.storage.parsing import parse_object

if TYPE_CHECKING:
    from rosa.training.finetune_arguments import FinetuneArguments

MADE_WITH_NAME = "made_with.json"

# Where engines keep the state of the optimizer instead: DeepSpeed's (the schedule's too), and FSDP's of peft's methods.
_DEEPSPEED, _FSDP = "global_step*", "optimizer_*"

# In the words of torch.save, and of the Rust of safetensors and tokenizers.
_OF_THE_DISK = ("PytorchStreamWriter", "inline_container", "iostream error", "(os error ")

# Not of the run but of one process of it, or compared in another form: the base and the data by digest, DeepSpeed's
# file by its contents, the batch by the rows of a step, so that it may be shared out over other processes.
_NOT_COMPARED = {
    "model", "data", "data_format", "data_split", "data_config", "data_revision", "dry_run", "output_dir", "resume",
    "overwrite", "resume_from_checkpoint", "local_rank", "deepspeed", "per_device_train_batch_size",
    "gradient_accumulation_steps",
}  # fmt: skip

# What a run may go on with in another form than it began; all else decides what is learnt.
_MAY_CHANGE = re.compile(
    # How far it goes: said, since the schedule is then another.
    "max_steps|num_train_epochs"
    # What is said, kept and measured on the way.
    "|(logging|log|save|eval|hub|trackio)_.*|report_to|run_name|project|push_to_hub|disable_tqdm|do_.*|debug"
    "|include_.*|skip_memory_metrics|per_device_eval_batch_size|prediction_loss_only|batch_eval_metrics"
    "|enable_jit_checkpoint"
    # The machine: what it has, how many of it there are, and what fits into it.
    "|bf16|tf32|.*_full_eval|use_cpu|(ddp|fsdp|torch_compile|activation_checkpointing|gradient_checkpointing)(_.*)?"
    "|response_logits|attn_implementation|torch_empty_cache_steps"
    "|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)"
    "|dataloader_multiprocessing_context"
)


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a Trainer's output folder, whole or not, by their steps."""
    name = re.compile(f"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
    found = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := name.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last complete checkpoint in a Trainer's output folder, or None.

    A killed process may leave a later one half-written, and `save_only_model` leaves none that is complete.
    """
    return next((str(path) for path in reversed(checkpoints(folder)) if fault(path) is None), None)


def fault(checkpoint: Path) -> str | None:
    """The file, and what is wrong with it, for which training cannot go on from a checkpoint; None if it can.

    The states of random numbers may be missing, as they are after a run of another number of processes.
    """
    if not is_finished(checkpoint):
        return f"{TRAINER_STATE_NAME} is missing or cut short"
    if any(checkpoint.glob(_DEEPSPEED)):
        return None
    for name in (SCHEDULER_NAME,) if any(checkpoint.glob(_FSDP)) else (OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (checkpoint / name).is_file():
            return f"{name} is missing, as --save_only_model leaves it"
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is cut short or no file of PyTorch's"
    return None


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, where the Trainer's state comes."""
    try:
        state = parse_object((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return type(state.get("global_step")) is int


@contextmanager
def unloadable_told(checkpoint: str | os.PathLike, *names: str) -> Iterator[None]:
    """Names the files that a block loads from a checkpoint, where they are damaged within or do not fit this run.

    Raises:
        ValueError: in place of what PyTorch raises.
    """
    try:
        yield
    except (
        RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{' or '.join(names)} in {checkpoint} cannot be loaded, or does not fit this run: "
            f"{type(error).__name__}: {error}"
        ) from error


@contextmanager
def unsaved_told(what: Path, run: str | os.PathLike) -> Iterator[None]:
    """Names what stands where a block cannot write, as on a full disk, which each library tells in its own way.

    Args:
        what (Path): that the block writes.
        run (path): the Trainer's output folder.

    Raises:
        OSError: in place of what the library raises.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not any(mark in str(error) for mark in _OF_THE_DISK):
            raise
        stands = last_checkpoint(run)
        left = "there is no checkpoint" if stands is None else f"{stands} stands: --resume goes on from it"
        raise OSError(
            f"{what} could not be saved (is there space left?): {' '.join(str(error).split())}; {left}"
        ) from error


def made_with(job: FinetuneArguments, args: TrainingArguments, rows: Sequence[Any]) -> dict[str, Any]:
    """What a run is made with, as its checkpoints know it: digests of the base and of the rows, and every setting.

    Args:
        job (FinetuneArguments): this package's part of the settings.
        args (TrainingArguments): transformers' part; tokens are masked.
        rows (sequence): all that is trained on or held out, or what stands for it, as `JobData.identity` has it.

    Raises:
        OSError, ValueError: the base is not there.
    """
    settings = job.settings(args.seed) | args.to_dict()
    made = {
        "base": base_digest(job.model),
        "data": digest(list(rows)),
        "deepspeed": _contents(args.deepspeed),
        "rows of a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **{name: value for name, value in settings.items() if name not in _NOT_COMPARED},
    }
    return json.loads(json.dumps(made, default=str))  # as it comes back


def changes(checkpoint: str, now: Mapping[str, Any]) -> str | None:
    """What has changed since a checkpoint was made and may, in words; None for nothing.

    Settings that only one of two versions knows, of this package or of transformers, are not compared.

    Args:
        checkpoint (str): its folder.
        now (mapping): `made_with` of the run that is to go on from it.

    Raises:
        ValueError: something else has changed, or what it was made with is not known.
    """
    try:
        was = parse_object((Path(checkpoint) / MADE_WITH_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} does not say what it was made with ({MADE_WITH_NAME} is missing or damaged), so this may be "
            "another run: --overwrite starts anew"
        ) from error
    changed = {
        name: f"{name} was {was[name]}, now {now[name]}" for name in now if was.get(name, now[name]) != now[name]
    }
    refused = [text for name, text in changed.items() if not _MAY_CHANGE.fullmatch(name)]
    if refused:
        raise ValueError(
            f"{checkpoint} was made with other settings: {'; '.join(refused)}. --resume goes on with the same, "
            "--overwrite starts anew"
        )
    if changed.keys() & {"max_steps", "num_train_epochs"} and "constant" not in now["lr_scheduler_type"]:
        changed["schedule"] = f"the learning rate now follows a {now['lr_scheduler_type']} schedule of the new length"
    return "; ".join(changed.values()) or None


def _contents(config: Any) -> Any:
    """DeepSpeed's configuration, which may be a file or what it holds."""
    return parse_object(Path(config).read_bytes()) if isinstance(config, (str, os.PathLike)) else config
