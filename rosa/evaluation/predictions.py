"""What a model said to the rows of a task, on disk: kept as it comes, found again by the run that goes on, and judged.

`NAME.jsonl` has a line for each row: `row` (its index), `instruction`, `input` and `prediction`, and once all rows of
the run are answered also `answer`, `extracted` and `correct`. `NAME.made_with.json` says what the predictions depend
on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rosa.evaluation.tasks import Task, extract_answer, is_correct
from rosa.storage.files import replace_files, replace_text
from rosa.storage.parsing import parse_object

_REMEDY = "choose another folder (--output), or overwrite what is there (--overwrite)"


def prediction(index: int, row: Mapping[str, object], text: str) -> dict:
    """The line of a row that was answered.

    Args:
        index (int): of the row.
        row (mapping): `instruction` and perhaps `input`.
        text (str): what the model wrote.
    """
    return {"row": index, **_asked(row), "prediction": text}


def judged(task: Task, line: Mapping[str, object], answer: str) -> dict:
    """The line of a row with the verdict that today's rules come to.

    Args:
        task (Task): the task as it is now.
        line (mapping): of `prediction`, or as an earlier run left it.
        answer (str): the truth as it is now.
    """
    text = line["prediction"]
    return {
        "row": line["row"],
        **_asked(line),
        "answer": answer,
        "prediction": text,
        "extracted": extract_answer(task, text),
        "correct": is_correct(task, text, answer),
    }


def read(
    file: Path, rows: Sequence[Mapping[str, object]], made_with: Mapping[str, object], *, partly: bool = False
) -> dict[int, dict]:
    """The lines of an earlier run by row, also those of rows beyond these. Changes no file.

    Args:
        file (Path): `NAME.jsonl`; there need be none.
        rows (sequence of mapping): `instruction` and perhaps `input`, of the run that goes on.
        made_with (mapping): what its predictions depend on, as JSON gives it back.
        partly (bool): this is not all of it, so that the rest cannot differ.

    Raises:
        ValueError: a file is damaged, or the predictions were made with something else or belong to other rows.
    """
    # Not splitlines: a prediction may hold U+2028 and other separators as they are. What follows the last line break
    # is a line that a kill has cut off.
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    if not lines:
        return {}
    _check_made_with(file, made_with, partly)
    known = {}
    for number, content in enumerate(lines, start=1):
        line = _parsed(content)
        if line is None:
            raise ValueError(f"{file}, line {number} is damaged: {_REMEDY}")
        index = line["row"]
        if index < len(rows) and _asked(line) != _asked(rows[index]):
            raise ValueError(f"the predictions in {file} belong to other rows: row {index} differs. {_REMEDY}")
        known[index] = line
    return known


def start(file: Path, lines: Iterable[Mapping[str, object]], made_with: Mapping[str, object]) -> None:
    """Makes the files of a run that more lines can be added to. A link that stands there gives way.

    Args:
        file (Path): `NAME.jsonl`, in a folder that is there.
        lines (iterable of mapping): what to keep.
        made_with (mapping): what the predictions depend on, for JSON.
    """
    # The predictions first: without a line they may stand beside whatever says what they were made with.
    about = json.dumps(made_with, indent=2) + "\n"
    replace_files({file: _text(lines).encode("utf-8"), _made_with_file(file): about.encode("utf-8")})


def write(file: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes the file of predictions anew, whole, in the order of the rows."""
    replace_text(file, _text(sorted(lines, key=lambda line: line["row"])))


def as_line(line: Mapping[str, object]) -> str:
    """As it stands in the file."""
    return json.dumps(line, ensure_ascii=False) + "\n"


def _text(lines: Iterable[Mapping[str, object]]) -> str:
    return "".join(map(as_line, lines))


def _asked(row: Mapping[str, object]) -> dict:
    return {"instruction": row["instruction"], "input": row.get("input") or ""}


def _parsed(content: bytes) -> dict | None:
    try:
        line = parse_object(content)
        asked = _asked(line)
        sound = type(line["row"]) is int and line["row"] >= 0
        return line if sound and all(isinstance(text, str) for text in (*asked.values(), line["prediction"])) else None
    except (ValueError, LookupError, TypeError):
        return None


def _check_made_with(file: Path, made_with: Mapping[str, object], partly: bool) -> None:
    beside = _made_with_file(file)
    try:
        earlier = parse_object(beside.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{beside} does not say what the predictions in {file} were made with: {_REMEDY}") from error
    names = made_with if partly else {**earlier, **made_with}
    different = [name for name in names if earlier.get(name) != made_with.get(name)]
    if different:
        both = "; ".join(f"{name} was {earlier.get(name)}, now {made_with.get(name)}" for name in different)
        raise ValueError(f"the predictions in {file} belong to another model or other settings: {both}. {_REMEDY}")


def _made_with_file(file: Path) -> Path:
    return file.with_suffix(".made_with.json")
