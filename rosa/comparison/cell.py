"""One cell of a comparison: train, evaluate, and write down what came out. A finished part is not repeated."""

from __future__ import annotations

import gc
import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from typing import Any

import torch

from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.comparison.inputs import Inputs, check_unchanged
from rosa.comparison.plan import Cell
from rosa.data.rows import load_rows
from rosa.evaluation.evaluate import PREDICTIONS, evaluate
from rosa.evaluation.loss import response_loss
from rosa.storage.files import replace_text
from rosa.storage.locking import alone_in
from rosa.storage.parsing import parse_object
from rosa.training.finetune import finetune
from rosa.training.methods import load_trained, resumes, trainable
from rosa.training.parsing import parse
from rosa.training.resuming import changes, last_checkpoint, made_with
from rosa.training.selective_trainer import SelectiveTrainer

RESULT_NAME, TRAINING_NAME, LOG_NAME = "result.json", "training.json", "log.txt"
PACKAGES = ("torch", "transformers", "peft")
OF_THE_MACHINE = {"attn_implementation"}  # settings that change an outcome by rounding alone


def read_result(cell: Cell, inputs: Inputs) -> dict[str, Any] | None:
    """What a finished cell wrote down, or None if it has not finished: also if its tests were of fewer or more rows, of
    fewer tasks, or judged by other truths or other rules of reading answers.

    Args:
        cell (Cell): one of a comparison's.
        inputs (Inputs): what it would be made with now.

    Raises:
        ValueError: it was made with other settings, another base, other training rows or other questions.
    """
    found = _read(cell, RESULT_NAME, inputs)
    if found is None or "tasks" not in found:
        return found
    changed = inputs.changed_tests(found["tested_with"])
    if changed:
        raise ValueError(_refusal(cell, changed))
    tested, now = found["tested_with"], inputs.of_tests()
    wanted = now["tasks"]
    if any(tested.get(name) != now.get(name) for name in ("rules", "others")):
        return None
    if any(tested["tasks"].get(name) != wanted[name] for name in wanted):
        return None
    return found | {"tasks": {name: found["tasks"][name] for name in wanted}}


def run_cell(cell: Cell, inputs: Inputs) -> None:
    """Train and evaluate a cell, and write its `result.json`; its log goes beside it.

    A cell that was killed goes on from its last checkpoint, or if it was trained already, from its last prediction. A
    loss that is no longer finite is a result too.

    Args:
        cell (Cell): what to run.
        inputs (Inputs): what to make it with.

    Raises:
        ValueError, OSError: the data, the model or the settings are at fault, or another process runs this cell.
    """
    with (
        alone_in(cell.folder, ".cell.lock"),
        open(cell.folder / LOG_NAME, "a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        check_unchanged(cell, inputs)
        try:
            outcome = _trained(cell, inputs) if cell.trains else {}
            _free_memory()
            if cell.tests:
                outcome |= _tested(cell, inputs)
        except FloatingPointError as error:
            outcome = {"diverged": str(error)}
        _write(cell, RESULT_NAME, inputs, outcome)
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _trained(cell: Cell, inputs: Inputs) -> dict[str, Any]:
    """What training came to, here or in an earlier process."""
    done = _read(cell, TRAINING_NAME, inputs)
    if done is not None:
        return done
    goes_on = _goes_on(cell)
    if not goes_on:  # answers of an adapter that is no more
        shutil.rmtree(cell.folder / PREDICTIONS, ignore_errors=True)
    job, args = parse([*cell.arguments, "--resume" if goes_on else "--overwrite"])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = finetune(job, args)
    number, total = trainable(trainer.model)
    trained_here = trainer.tokens_per_second is not None
    course = list(trainer.state.log_history)
    training = {
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "trainable": number,
        "total": total,
        "steps": trainer.state.global_step,
        "tokens_per_second": trainer.tokens_per_second,
        # A process that found nothing left to train has seen no step's memory.
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() and trained_here else None,
        "validation_loss": _validation_loss(trainer) if job.val_size else None,
        "course": course,
    }
    _write(cell, TRAINING_NAME, inputs, training)
    return training


def _validation_loss(trainer: SelectiveTrainer) -> float:
    """Of the model as training left it; where the last step ended with it, as it was measured then."""
    last = trainer.state.global_step
    log = trainer.state.log_history
    measured = [entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"] == last]
    if measured and not trainer.args.load_best_model_at_end:
        return measured[-1]
    return trainer.evaluate()["eval_loss"]


def _goes_on(cell: Cell) -> bool:
    """Whether the cell has a checkpoint that was made with just what it would be made with now: no cell is trained by
    two schedules."""
    job, args = parse(cell.arguments)
    checkpoint = last_checkpoint(cell.folder)
    if checkpoint is None or not resumes(job.method):
        return False
    try:
        return changes(checkpoint, made_with(job, args, load_rows(job.data))) is None
    except ValueError:
        return False


def _tested(cell: Cell, inputs: Inputs) -> dict[str, Any]:
    """The accuracies on all tasks, and what they were made with.

    Of the model as it is loaded again: what training holds beside it, several times as much on a small base, is gone.
    """
    model = load_model(cell.model, load_in=cell.load_in)
    if cell.trains:
        model = load_trained(model, cell.folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    size = {} if cell.trains else {"trainable": 0, "total": model.num_parameters()}
    tokenizer = load_tokenizer(cell.model)
    found = evaluate(
        model,
        tokenizer,
        inputs.rows,
        cell.folder,
        max_new_tokens=inputs.decoding.max_new_tokens,
        batch_size=inputs.decoding.batch_size,
        # The weights of a reloaded model may be shaped otherwise, as AdaLoRA's are.
        made_with=_without_machine(cell.settings) | inputs.of_training(cell),
    )
    tests = size | {"tasks": found.to_dict()["tasks"], "tested_with": inputs.of_tests()}
    if cell.trains:
        tests |= {"seen": inputs.seen[cell.settings["data"]]}
    if not inputs.others:
        return tests
    return tests | {"forgetting_loss": response_loss(model, tokenizer, inputs.others)}


def _without_machine(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in OF_THE_MACHINE}


def _read(cell: Cell, name: str, inputs: Inputs) -> dict[str, Any] | None:
    file = cell.folder / name
    if not file.exists():
        return None
    try:
        found = parse_object(file.read_bytes())
        made_with = {**found["settings"], **found["made_with"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} does not say what it was made with: choose another output, or delete it") from error
    now = json.loads(json.dumps({**cell.settings, **inputs.of_training(cell)}))  # as they come back
    changed = [key for key in (now | made_with).keys() - OF_THE_MACHINE if now.get(key) != made_with.get(key)]
    if changed:
        raise ValueError(_refusal(cell, changed))
    return found


def _refusal(cell: Cell, changed: list[str]) -> str:
    return f"{cell.folder} was made with other settings ({', '.join(changed)}): choose another output, or delete it"


def _write(cell: Cell, name: str, inputs: Inputs, outcome: dict[str, Any]) -> None:
    about = {
        "model": cell.model,
        "method": cell.method,
        "settings": cell.settings,
        "made_with": inputs.of_training(cell),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "versions": {package: version(package) for package in PACKAGES},
    }
    replace_text(cell.folder / name, json.dumps(about | outcome, indent=1))
