"""Evaluation on tasks: greedy answers to test rows, kept as they come, and the accuracy with its interval."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from rosa.data.prompt_form import INSTRUCTION
from rosa.data.prompts import prompt, question_ids
from rosa.evaluation.generation import answers, check_options, check_text, stop_ids
from rosa.evaluation.predictions import as_line, judged, prediction, read, start, write
from rosa.evaluation.tasks import Task
from rosa.evaluation.tasks.answers import read_truth
from rosa.storage.digest import digest, tokenizer_digest
from rosa.storage.locking import alone_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREDICTIONS = "predictions"
CONFIDENCE = 0.95
_SAMPLES = 4096  # about so many values of each tensor go into the fingerprint of a model


@dataclass(frozen=True)
class Score:
    """How many of the rows were answered correctly."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy, in percent: Wilson's score interval (Wilson 1927)."""
        share, z = self.correct / self.total, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        scale = 1 + z**2 / self.total
        middle = (share + z**2 / (2 * self.total)) / scale
        half = z / scale * math.sqrt(share * (1 - share) / self.total + z**2 / (4 * self.total**2))
        return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)

    def to_dict(self) -> dict[str, object]:
        """For JSON; accuracy and interval in percent."""
        counts = {"correct": self.correct, "total": self.total}
        return {**counts, "accuracy": self.accuracy, "interval": list(self.interval)}


@dataclass(frozen=True)
class Evaluation:
    """The score on each task, by the task's name, in the order of evaluation."""

    scores: dict[str, Score]

    @property
    def average(self) -> Score:
        """The micro-average: over all rows of all tasks."""
        scores = self.scores.values()
        return Score(sum(score.correct for score in scores), sum(score.total for score in scores))

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        tasks = {name: score.to_dict() for name, score in self.scores.items()}
        return {"tasks": tasks, "average": self.average.to_dict()}

    def table(self) -> str:
        """The scores as text, a line for each task and one for the micro-average."""
        named = {**self.scores, "micro-average": self.average}
        width = max(map(len, named))
        lines = [f"{'task':{width}}  correct  total  accuracy  95 % interval"]
        for name, score in named.items():
            low, high = score.interval
            counts = f"{score.correct:7}  {score.total:5}"
            lines.append(f"{name:{width}}  {counts}  {score.accuracy:6.2f} %  {low:.2f} to {high:.2f}")
        return "\n".join(lines)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[Task, Sequence[dict]],
    folder: str | os.PathLike,
    *,
    form: str = INSTRUCTION,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    made_with: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Answer the rows of tasks greedily, and score the answers.

    The answers go to `folder/predictions/NAME.jsonl` batch by batch, a line for each row, and are kept with what they
    depend on (see `rosa.evaluation.predictions`). Rows that are there already are not answered again, so a run that was
    killed goes on where it was, and a run on the first rows can be extended. They are judged again: once a task's rows
    are answered, its lines have `prediction`, `answer`, `extracted` and `correct`. Lines of rows beyond these stay as
    they are.

    One process at a time works in `folder/predictions`. `folder` itself is not locked here: the caller may have.

    Args:
        model (PreTrainedModel): a causal language model, with its adapter if it has one.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        tasks (mapping of Task to sequence of dict): the rows of `rosa.evaluation.tasks.load_test_rows` for each task.
        folder (path): for the predictions; made if need be.
        form (str): how rows are asked, one of `rosa.data.prompt_form.FORMS`: the paper's prompt, the tokenizer's
            chat template, or as they are.
        max_new_tokens (int): most tokens of an answer.
        batch_size (int): rows decoded together. In float32 the answers do not depend on it; in 16-bit types, padding
            can round a near tie between two tokens the other way.
        made_with (mapping, optional): what tells the model from others, for JSON, by which a resumed run knows its
            own; None takes the fingerprint of its weights. The rows, the prompt, the tokenizer, what ends an answer and
            `max_new_tokens` count in any case.
        overwrite (bool): discard earlier predictions for these tasks.

    Returns:
        Evaluation: the scores.

    Raises:
        ValueError: no tasks or no rows, a row that is no text or whose truth is not in its task's form, a number below
            1, another process at work in the folder, or predictions there that are damaged or belong to another model,
            other rows or other settings. The predictions are as they were then.
    """
    if not tasks or not all(tasks.values()):
        raise ValueError("there is nothing to evaluate: give at least one task, and rows for each")
    for task, rows in tasks.items():
        for index, row in enumerate(rows):
            _check_row(task, index, row)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    check_options(**options)
    made_with = _made_with(model, tokenizer, form, max_new_tokens, made_with)
    files = {task: _file(Path(folder), task) for task in tasks}
    with alone_in(Path(folder) / PREDICTIONS):
        known = {task: {} if overwrite else read(files[task], rows, made_with) for task, rows in tasks.items()}
        for task, file in files.items():
            start(file, known[task].values(), made_with)
        missing = {task: [i for i in range(len(rows)) if i not in known[task]] for task, rows in tasks.items()}
        left, total = sum(map(len, missing.values())), sum(map(len, tasks.values()))
        scores = {}
        with tqdm(total=total, initial=total - left, unit="row") as bar:
            for task, rows in tasks.items():
                bar.set_description(task.name)
                asked = [(rows[i]["instruction"], rows[i].get("input") or "") for i in missing[task]]
                prompts = [question_ids(form, tokenizer, *question) for question in asked]
                with open(files[task], "a", encoding="utf-8") as file:
                    for position, text in answers(model, tokenizer, prompts, form=form, **options):
                        index = missing[task][position]
                        known[task][index] = prediction(index, rows[index], text)
                        file.write(as_line(known[task][index]))
                        file.flush()
                        bar.update()
                verdicts = {i: judged(task, known[task][i], row["answer"]) for i, row in enumerate(rows)}
                write(files[task], {**known[task], **verdicts}.values())
                scores[task.name] = Score(sum(line["correct"] for line in verdicts.values()), len(rows))
    return Evaluation(scores)


def check_earlier(
    tasks: Mapping[Task, Sequence[dict]], folder: str | os.PathLike, made_with: Mapping[str, object]
) -> None:
    """Refuses earlier predictions that `evaluate` could not go on with, as far as can be told without the model.

    Args:
        tasks, folder: as for `evaluate`.
        made_with (mapping): what is known by now of what predictions depend on, as JSON gives it back; None for what
            they do not have.

    Raises:
        ValueError: predictions there are damaged, or belong to another model, other rows or other settings.
    """
    for task, rows in tasks.items():
        read(_file(Path(folder), task), rows, made_with, partly=True)


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of a sample of every tensor of a model: other weights, or an adapter trained further, give another.

    Args:
        model (torch.nn.Module): with its adapter, if it has one. Of tensors on the meta device and of quantised types
            with a storage of their own, name, shape and dtype count alone.

    Returns:
        str: 16 hexadecimal digits, the same on every device.
    """
    content = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # what some modules keep beside their tensors
            continue
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            continue
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLES)].contiguous().cpu()
        content.update(values.view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def _file(folder: Path, task: Task) -> Path:
    return folder / PREDICTIONS / f"{task.name}.jsonl"


def _check_row(task: Task, index: int, row: dict) -> None:
    try:
        read_truth(task, row["answer"])
        for field in ("instruction", "input", "answer"):
            check_text(row.get(field) or "")
    except ValueError as error:
        raise ValueError(f"{task.name}, row {index}: {error}") from error


def _made_with(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    form: str,
    max_new_tokens: int,
    made_with: Mapping[str, object] | None,
) -> dict[str, object]:
    """All that predictions depend on beside the rows, as JSON gives it back."""
    examples = [("instruction",), ("instruction", "input")]
    if form == INSTRUCTION:
        asked = [prompt(*example) for example in examples]
    else:
        asked = [form, *(question_ids(form, tokenizer, *example) for example in examples)]
    about = {
        **({"weights": fingerprint(model)} if made_with is None else made_with),
        "max_new_tokens": max_new_tokens,
        "tokenizer": tokenizer_digest(tokenizer),
        "stop": stop_ids(model, tokenizer, form),
        "prompt": digest(asked),
    }
    return json.loads(json.dumps(about))
