"""What the cells of a comparison are made with beyond their settings: bases, training rows and tests, by content.

Every result says what it was made with, so that no table mixes results of different makings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rosa.comparison.overlap import seen
from rosa.comparison.plan import Cell, Comparison, Decoding
from rosa.data.rows import load_rows
from rosa.evaluation.tasks import Task, find_tasks, load_test_rows
from rosa.evaluation.tasks.answers import rules_digest
from rosa.storage.digest import base_digest, digest


@dataclass(frozen=True)
class Inputs:
    """The contents behind the names in a comparison's settings.

    Attributes:
        bases (mapping of str to str): the digest of each base by its name.
        data (mapping of str to str): the digest of the training rows by the data's name.
        tests (mapping of Task to sequence of dict): all test rows of every task.
        decoding (Decoding): how answers are made, and to how many rows.
        others (sequence of dict): the rows whose loss shows what was forgotten; empty for none.
        seen (mapping of str to mapping): by the data's name, the share of each task's rows that are tested on whose
            question is a training row's, in percent.
    """

    bases: Mapping[str, str]
    data: Mapping[str, str]
    tests: Mapping[Task, Sequence[dict]]
    decoding: Decoding
    others: Sequence[dict] = ()
    seen: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[Task, Sequence[dict]]:
        """The rows that are tested on."""
        return {task: rows[: self.decoding.limit] for task, rows in self.tests.items()}

    def of_training(self, cell: Cell) -> dict[str, str]:
        """What the cell's model is made with."""
        data = {"data": self.data[cell.settings["data"]]} if cell.trains else {}
        return {"base": self.bases[cell.model], **data}

    def of_tests(self) -> dict[str, Any]:
        """What an outcome's accuracies are made with."""
        tasks = {task.name: _of_task(task, rows) for task, rows in self.rows.items()}
        others = {"others": digest(list(self.others))} if self.others else {}
        return {"max_new_tokens": self.decoding.max_new_tokens, "rules": rules_digest(), "tasks": tasks, **others}

    def changed_tests(self, earlier: Mapping[str, Any]) -> list[str]:
        """What of an earlier outcome's tests, as `of_tests` told them, was asked otherwise than it would be now. More
        rows, fewer rows, further tasks, other truths and other rules are no such thing: they cost few new answers or
        none."""
        tasks = {task.name: (task, rows) for task, rows in self.tests.items()}
        changed = [] if earlier["max_new_tokens"] == self.decoding.max_new_tokens else ["max_new_tokens"]
        for name, found in earlier["tasks"].items():
            if name in tasks:
                task, rows = tasks[name]
                if _of_task(task, rows[: found["rows"]])["questions"] != found["questions"]:
                    changed.append(f"the rows of {name}")
        return changed


def read_inputs(comparison: Comparison, cells: Iterable[Cell]) -> Inputs:
    """The inputs of these cells as they are now.

    Raises:
        ValueError, OSError: a base, the data or a task is not there, or is damaged.
    """
    names = ",".join(filter(None, (comparison.tasks, comparison.side_tasks)))
    tests = {task: load_test_rows(task, comparison.data_dir) for task in find_tasks(names, comparison.data_dir)}
    data = {name: load_rows(name) for name in sorted({cell.settings["data"] for cell in cells if cell.trains})}
    forgetting, limit = comparison.forgetting, comparison.decoding.limit
    asked = {task.name: rows[:limit] for task, rows in tests.items()}
    return Inputs(
        bases={model: base_digest(model) for model in comparison.models},
        data={name: digest(rows) for name, rows in data.items()},
        tests=tests,
        decoding=comparison.decoding,
        others=[] if forgetting is None else load_rows(forgetting.data)[: forgetting.rows],
        seen={
            name: {task: 100 * fmean(seen(some, rows)) for task, some in asked.items()} for name, rows in data.items()
        },
    )


def check_unchanged(cell: Cell, inputs: Inputs) -> None:
    """Raises ValueError if the cell's base or its training rows have changed since the inputs were read."""
    now = {"base": base_digest(cell.model)}
    if cell.trains:
        now["data"] = digest(load_rows(cell.settings["data"]))
    changed = [name for name, found in inputs.of_training(cell).items() if now[name] != found]
    if changed:
        raise ValueError(f"the {' and the '.join(changed)} changed while the comparison ran: begin another one")


def _of_task(task: Task, rows: Sequence[dict]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "questions": digest([[row["instruction"], row.get("input") or ""] for row in rows]),
        "answers": digest([task.answer, [row["answer"] for row in rows]]),
    }
