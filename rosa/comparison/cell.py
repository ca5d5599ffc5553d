"""One cell of a comparison: train, evaluate, and write down what came out. A finished part is not repeated."""

from __future__ import annotations

import gc
import json
import os
import platform
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rosa.comparison.plan import Cell, Decoding
from rosa.evaluation import evaluate
from rosa.finetune import finetune
from rosa.finetune_arguments import parse
from rosa.methods import load_trained, resumes, trainable
from rosa.tasks import find_tasks, load_test_rows
from rosa.trainer import last_checkpoint

RESULT_NAME, TRAINING_NAME, LOG_NAME = "result.json", "training.json", "log.txt"
PACKAGES = ("torch", "transformers", "peft")


def read_result(cell: Cell) -> dict[str, Any] | None:
    """What a finished cell wrote down, or None if it has not finished.

    Raises:
        ValueError: it was made with other settings.
    """
    return _read(cell, RESULT_NAME)


def run_cell(cell: Cell, tasks: str, data_dir: Path | None, decoding: Decoding) -> None:
    """Train and evaluate a cell, and write its `result.json`; its log goes beside it.

    A cell that was killed goes on from its last checkpoint, or if it was trained already, from its last prediction. A
    loss that is no longer finite is a result too.

    Args:
        cell (Cell): what to run.
        tasks (str): all tasks to test it on.
        data_dir (Path or None): their folders.
        decoding (Decoding): how answers are made.

    Raises:
        ValueError, OSError: the data, the model or the settings are at fault.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / LOG_NAME, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            training, model = _trained(cell) if cell.trains else _untrained(cell)
            outcome = {"tasks": _tested(cell, model, tasks, data_dir, decoding)} if cell.tests else {}
        except FloatingPointError as error:
            training, model, outcome = {}, None, {"diverged": str(error)}
        _write(cell, RESULT_NAME, training | outcome)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _trained(cell: Cell) -> tuple[dict[str, Any], PreTrainedModel | None]:
    """What training came to, and the model unless an earlier process trained it."""
    done = _read(cell, TRAINING_NAME)
    if done is not None:
        return done, None
    job, _ = parse(cell.arguments)
    goes_on = resumes(job.method) and last_checkpoint(cell.folder) is not None
    job, args = parse([*cell.arguments, "--resume" if goes_on else "--overwrite"])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = finetune(job, args)
    number, total = trainable(trainer.model)
    runtime = next(entry["train_runtime"] for entry in reversed(trainer.state.log_history) if "train_runtime" in entry)
    training = {
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "trainable": number,
        "total": total,
        "steps": trainer.state.global_step,
        "seconds": runtime,
        "tokens_per_second": int(trainer.state.num_input_tokens_seen) / runtime,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "validation_loss": trainer.evaluate()["eval_loss"] if job.val_size else None,
    }
    _write(cell, TRAINING_NAME, training)
    return training, trainer.model


def _untrained(cell: Cell) -> tuple[dict[str, Any], PreTrainedModel]:
    model = AutoModelForCausalLM.from_pretrained(cell.model, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {"trainable": 0, "total": model.num_parameters()}, model


def _tested(
    cell: Cell, model: PreTrainedModel | None, tasks: str, data_dir: Path | None, decoding: Decoding
) -> dict[str, dict]:
    if model is None:
        model = load_trained(AutoModelForCausalLM.from_pretrained(cell.model, dtype="auto"), cell.folder)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = {task: load_test_rows(task, data_dir)[: decoding.limit] for task in find_tasks(tasks, data_dir)}
    found = evaluate(
        model,
        AutoTokenizer.from_pretrained(cell.model),
        rows,
        cell.folder,
        max_new_tokens=decoding.max_new_tokens,
        batch_size=decoding.batch_size,
        # The weights of a reloaded model may be shaped otherwise, as AdaLoRA's are.
        made_with=dict(cell.settings),
    )
    return found.to_dict()["tasks"]


def _read(cell: Cell, name: str) -> dict[str, Any] | None:
    file = cell.folder / name
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    settings = json.loads(json.dumps(cell.settings))  # as they come back
    changed = [key for key in settings | found["settings"] if settings.get(key) != found["settings"].get(key)]
    if changed:
        raise ValueError(
            f"{cell.folder} was made with other settings ({', '.join(changed)}): choose another output, or delete it"
        )
    return found


def _write(cell: Cell, name: str, outcome: dict[str, Any]) -> None:
    about = {
        "model": cell.model,
        "method": cell.method,
        "settings": cell.settings,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "versions": {package: version(package) for package in PACKAGES},
    }
    text = json.dumps(about | outcome, indent=1)
    temporary = cell.folder / f"{name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, cell.folder / name)  # whole, or not there
