"""Finding tasks by name, and their test rows in a folder in LLM-Adapters' form or on the hub."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from rosa.data.files import dataset_rows
from rosa.data.rows import load_rows
from rosa.evaluation.tasks.answers import read_truth
from rosa.evaluation.tasks.benchmarks import GROUPS, TASKS
from rosa.evaluation.tasks.task import FORMS, Task
from rosa.storage.parsing import parse_object

LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters"


def find_tasks(names: str, data_dir: Path | None = None) -> list[Task]:
    """The tasks that a list of names stands for.

    Args:
        names (str): names of tasks and of the groups "commonsense" and "arithmetic", with commas between.
        data_dir (Path, optional): the folder of data. A task that is not one of the fifteen benchmarks describes itself
            there, in NAME/task.json: `{"answer": FORM}`, FORM being "number", "letter", "text" or a list of options.

    Returns:
        list of Task: in the order of the names, each once.

    Raises:
        ValueError: a name that nothing is known by, or a task.json that describes no task.
        FileNotFoundError: there is no such `data_dir`.
    """
    _check_folder(data_dir)
    named = [name.strip() for name in names.split(",") if name.strip()]
    if not named:
        raise ValueError("no task is named: give commonsense, arithmetic or names of tasks with commas between")
    return list(dict.fromkeys(task for name in named for task in _tasks_of(name, data_dir)))


def load_test_rows(task: Task, data_dir: Path | None = None) -> list[dict]:
    """The rows that a task is tested on.

    Args:
        task (Task): a benchmark, or a task of `find_tasks`.
        data_dir (Path, optional): the folder with the file NAME/test.json; None takes the original data set from the
            hub, each row turned into LLM-Adapters' wording.

    Returns:
        list of dict: `instruction`, `input` ("" where there was none) and `answer`, which is in the task's form, and
        whatever else the file has.

    Raises:
        FileNotFoundError: a folder, the file or the data set is missing.
        ValueError: the data is not in this form; the message names the row.
    """
    if data_dir is None:
        return _hub_rows(task)
    folder = Path(data_dir) / task.name
    _check_folder(data_dir)
    _check_folder(folder)
    file = folder / "test.json"
    rows = load_rows(str(file), target="answer")
    _check_answers(task, rows, str(file))
    return rows


def _tasks_of(name: str, data_dir: Path | None) -> tuple[Task, ...]:
    if name in GROUPS:
        return GROUPS[name]
    if name in TASKS:
        return (TASKS[name],)
    own = {} if data_dir is None else {file.parent.name: file for file in sorted(Path(data_dir).glob("*/task.json"))}
    if name in own:
        return (Task(name, _form(own[name])),)
    known = {known.lower(): known for known in (*GROUPS, *TASKS, *own)}
    near = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f"did you mean {known[near[0]]}? " if near else ""
    folder = "--data-dir, the folder of data, and there " if data_dir is None else ""
    described = Path(data_dir or "") / name / "task.json"
    raise ValueError(
        f"there is no task {name!r}: {meant}Known are {', '.join(known.values())}; a task of your own needs "
        f"{folder}{described}"
    )


def _form(file: Path) -> tuple[str, ...] | str:
    """The form of answers that a task.json describes."""
    try:
        description = parse_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} must describe a task: {error}") from error
    if set(description) != {"answer"}:
        raise ValueError(f'{file} must be {{"answer": FORM}} and nothing else, got {json.dumps(description)[:80]}')
    form = description["answer"]
    if form in FORMS:
        return form
    if isinstance(form, list) and all(isinstance(option, str) and option.strip() == option != "" for option in form):
        if len({option.casefold() for option in form}) == len(form) > 1:
            return tuple(form)
        raise ValueError(
            f"{file}: `answer` must list two different options at least, each once, got {json.dumps(form)}"
        )
    raise ValueError(
        f"{file}: `answer` must be {', '.join(map(json.dumps, FORMS))} or a list of options, got {json.dumps(form)}"
    )


def _hub_rows(task: Task) -> list[dict]:
    remedy = f"give a data folder (--data-dir) with {task.name}/test.json, such as dataset/ of {LLM_ADAPTERS}"
    if task.hub is None:
        raise FileNotFoundError(f"no data set of the hub is known to have the rows of {task.name}: {remedy}")
    hub = task.hub
    try:
        rows = [
            {"input": "", **hub.convert(row)}
            for row in dataset_rows(hub.name, hub.split, config=hub.config, revision=hub.revision)
        ]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Or {remedy}") from error
    except LookupError as error:
        raise ValueError(f"{hub.name} has changed its columns, {error} is not as expected: {remedy}") from error
    if len(rows) != hub.rows:
        raise ValueError(f"{hub.name} has {len(rows)} rows, {task.name} of the paper has {hub.rows}: {remedy}")
    _check_answers(task, rows, hub.name)
    return rows


def _check_answers(task: Task, rows: list[dict], place: str) -> None:
    for index, row in enumerate(rows):
        try:
            read_truth(task, row["answer"])
        except ValueError as error:
            raise ValueError(f"{place}, row {index}: {error}") from error


def _check_folder(folder: Path | None) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
