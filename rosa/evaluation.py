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

from rosa.data import prompt
from rosa.generation import answers
from rosa.tasks import Task, extract_answer, is_correct
from rosa.tasks.answers import read_truth

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    max_new_tokens: int = 256,
    batch_size: int = 8,
    made_with: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Answer the rows of tasks greedily, with the paper's prompt, and score the answers.

    The answers go to `folder/predictions/NAME.jsonl` batch by batch, a line for each row: `row` (its index),
    `instruction`, `input`, `prediction`, `extracted`, `answer` and `correct`. Rows that are there already are not
    answered again, so a run that was killed goes on where it was, and a run on the first rows can be extended. What the
    answers depend on stands beside them in `NAME.made_with.json`.

    Args:
        model (PreTrainedModel): a causal language model, with its adapter if it has one.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        tasks (mapping of Task to sequence of dict): the rows of `rosa.tasks.load_test_rows` for each task.
        folder (path): for the predictions; made if need be.
        max_new_tokens (int): most tokens of an answer.
        batch_size (int): rows decoded together. In float32 the answers do not depend on it; in 16-bit types, padding
            can round a near tie between two tokens the other way.
        made_with (mapping, optional): what the answers depend on beside the rows and `max_new_tokens`, for JSON, by
            which a resumed run knows its own; None takes the fingerprint of the model's weights.
        overwrite (bool): discard earlier predictions for these tasks.

    Returns:
        Evaluation: the scores.

    Raises:
        ValueError: no tasks or no rows, a truth not in its task's form, or predictions in `folder` that are damaged or
            belong to another model, other rows or other settings. The folder is as it was then.
    """
    if not tasks or not all(tasks.values()):
        raise ValueError("there is nothing to evaluate: give at least one task, and rows for each")
    for task, rows in tasks.items():
        for row in rows:
            read_truth(task, row["answer"])
    made_with = {"weights": fingerprint(model)} if made_with is None else made_with
    made_with = json.loads(json.dumps({**made_with, "max_new_tokens": max_new_tokens}))  # as it will be read back
    files = {task: Path(folder) / "predictions" / f"{task.name}.jsonl" for task in tasks}
    known = {task: {} if overwrite else _read_predictions(files[task], rows, made_with) for task, rows in tasks.items()}
    (Path(folder) / "predictions").mkdir(parents=True, exist_ok=True)
    for file in files.values():
        _start_file(file, made_with, keep=not overwrite)
    done, total = sum(map(len, known.values())), sum(map(len, tasks.values()))
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with tqdm(total=total, initial=done, unit="row") as bar:
        for task, rows in tasks.items():
            bar.set_description(task.name)
            missing = [index for index in range(len(rows)) if index not in known[task]]
            prompts = [prompt(rows[index]["instruction"], rows[index].get("input") or "") for index in missing]
            with open(files[task], "a", encoding="utf-8") as file:
                for position, text in answers(model, tokenizer, prompts, **options):
                    line = _prediction(task, missing[position], rows[missing[position]], text)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    known[task][line["row"]] = line["correct"]
                    bar.update()
    return Evaluation({task.name: Score(sum(known[task].values()), len(tasks[task])) for task in tasks})


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of a sample of every tensor of a model: other weights, or an adapter trained further, give another.

    Args:
        model (torch.nn.Module): with its adapter, if it has one. Of tensors on the meta device and of quantised types
            with a storage of their own, name, shape and dtype count alone.

    Returns:
        str: 16 hexadecimal digits, the same on every device.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # what some modules keep beside their tensors
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            continue
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLES)].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _prediction(task: Task, index: int, row: dict, text: str) -> dict:
    return {
        "row": index,
        **_asked(row),
        "prediction": text,
        "extracted": extract_answer(task, text),
        "correct": is_correct(task, text, row["answer"]),
    }


def _asked(row: dict) -> dict:
    return {"instruction": row["instruction"], "input": row.get("input") or "", "answer": row["answer"]}


def _read_predictions(file: Path, rows: Sequence[dict], made_with: dict) -> dict[int, bool]:
    """Which of the rows were answered before, and whether correctly. Changes no file."""
    if not file.exists():
        return {}
    remedy = "choose another folder, or overwrite what is there (--overwrite)"
    beside = _made_with_file(file)
    try:
        earlier = json.loads(beside.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{beside} does not say what the predictions in {file} were made with: {remedy}") from error
    different = [name for name in {**earlier, **made_with} if earlier.get(name) != made_with.get(name)]
    if different:
        both = "; ".join(f"{name} was {earlier.get(name)}, now {made_with.get(name)}" for name in different)
        raise ValueError(f"the predictions in {file} belong to another model or other settings: {both}. {remedy}")
    known = {}
    for number, line in enumerate(_whole_lines(file).splitlines(), start=1):
        try:
            prediction = json.loads(line)
            index, asked, correct = prediction["row"], _asked(prediction), bool(prediction["correct"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is damaged: {remedy}") from error
        if index in range(len(rows)):  # a run on the first rows leaves the others as they are
            if asked != _asked(rows[index]):
                raise ValueError(f"the predictions in {file} belong to other rows: row {index} differs. {remedy}")
            known[index] = correct
    return known


def _start_file(file: Path, made_with: dict, *, keep: bool) -> None:
    """Makes a file of predictions ready for more lines: empty, or without the line that a kill has cut off."""
    if keep and file.exists():
        os.truncate(file, len(_whole_lines(file)))
        return
    file.unlink(missing_ok=True)  # first, lest it ever stand beside what does not belong to it
    _made_with_file(file).write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")


def _whole_lines(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _made_with_file(file: Path) -> Path:
    return file.with_suffix(".made_with.json")
