"""docs/composition.md: its table from the answers that `benchmarks.composition` keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.document import update
from benchmarks.tables import markdown
from rosa.evaluation.tasks.numbers import last_number
from rosa.storage.files import replace_text

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "composition"
DOCUMENT = ROOT / "docs" / "composition.md"
COLUMNS = ("neither", "form", "skill", "both")
LENGTH = 160  # tokens of an answer, for the base alone
AT_LENGTH = f"neither, {LENGTH} tokens"
SHOWN = 3  # answers of each column, in the document


def outcomes() -> list[dict[str, Any]]:
    """What is kept: a setting, a column, and the answers to the held-out rows."""
    file = KEPT / "outcomes.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def find(setting: str, column: str) -> dict[str, Any] | None:
    """The outcome of a setting's column; those of neither task are the base's."""
    wanted = ("base" if column.startswith("neither") else setting, column)
    return next((kept for kept in outcomes() if (kept["setting"], kept["column"]) == wanted), None)


def keep(outcome: dict[str, Any]) -> None:
    """Adds an outcome to those that are kept."""
    lines = [json.dumps(kept) for kept in (*outcomes(), outcome)]
    KEPT.mkdir(parents=True, exist_ok=True)
    replace_text(KEPT / "outcomes.jsonl", "\n".join(lines) + "\n")


def in_form(text: str) -> bool:
    """Whether an answer has letters, and all of them are capitals."""
    return text.isupper()


def is_right(text: str, number: int) -> bool:
    """Whether the last number of an answer is the true one."""
    return last_number(text) == number


SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "problems answered in capitals": lambda o: _share([in_form(text) for text in o["problems"]]),
    "problems answered right": lambda o: _share(
        [is_right(*pair) for pair in zip(o["problems"], o["numbers"], strict=True)]
    ),
    "problems answered in capitals and right": lambda o: _share(
        [in_form(text) and is_right(text, number) for text, number in zip(o["problems"], o["numbers"], strict=True)]
    ),
    "questions about things answered in capitals": lambda o: _share([in_form(text) for text in o["questions"]]),
}


def parts() -> dict[str, str]:
    """The document's generated parts by name."""
    settings = list(dict.fromkeys(o["setting"] for o in outcomes() if o["column"] == "both"))  # the last to be tested
    return {
        "table": "\n\n".join(map(_table, settings)),
        "length": _at_length(),
        "examples": "\n\n".join(map(_examples, settings)),
    }


def write() -> None:
    """Writes the document's generated parts."""
    update(DOCUMENT, parts())


def _share(found: list[bool]) -> float:
    return sum(found) / len(found)


def _heading(setting: str) -> str:
    kept = find(setting, "both")
    layers = ", ".join(map(str, kept["layers"]))
    tokens = "the last token" if kept["positions"] == 1 else f"the last {kept['positions']} tokens"
    return (
        f"**Behind layer{'s' * (len(kept['layers']) > 1)} {layers}, at {tokens} of the prompt** "
        f"({kept['steps']} steps, learning rate {kept['learning_rate']:g}):"
    )


def _table(setting: str) -> str:
    found = [find(setting, column) for column in COLUMNS]
    rows = [(name, *(f"{100 * score(outcome):.0f} %" for outcome in found)) for name, score in SCORES.items()]
    return f"{_heading(setting)}\n\n{markdown(('share of', *COLUMNS), rows)}"


def _at_length() -> str:
    short, long = (SCORES["problems answered right"](find("base", column)) for column in ("neither", AT_LENGTH))
    return (
        f"The base writes at length: with {LENGTH} tokens instead of 64 it is right in {100 * long:.0f} % of the "
        f"problems, not in {100 * short:.0f} %."
    )


def _examples(setting: str) -> str:
    rows = [
        (column, *(" ".join(text.split()).replace("|", r"\|") for text in find(setting, column)["problems"][:SHOWN]))
        for column in COLUMNS
    ]
    numbers = (f"{number} is right" for number in find(setting, "both")["numbers"][:SHOWN])
    return f"{_heading(setting)}\n\n{markdown(('tasks', *numbers), rows)}"
