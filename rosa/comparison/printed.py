"""What a paper prints: figures to set beside those that a comparison measures."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

from rosa.evaluation.tasks import TASKS
from rosa.storage.settings import check_keys

TRAINABLE, MICRO = "trainable", "micro-average"  # columns of figures beside those of tasks
_NAMES = ["model", "method"]


@dataclass(frozen=True)
class Printed:
    """The figures of a printed table, in percent, with the digits that are printed.

    Args:
        tasks (tuple of str): those that its micro-average is over.
        figures (mapping): of each (model, method), by their printed names, the figures by column: a task, `trainable`
            or `micro-average`.
    """

    tasks: tuple[str, ...] = ()
    figures: Mapping[tuple[str, str], Mapping[str, Decimal]] = field(default_factory=dict)

    def of(self, model: str, method: str, averaged: Collection[str]) -> dict[str, Decimal]:
        """The figures for one row of a comparison's table, by column; empty if none are printed.

        Args:
            model (str): folder or Hub name of the base, of which the last part counts.
            method (str): the row's name.
            averaged (collection of str): the tasks of the comparison's micro-average. The printed one is left out where
                it is over others.
        """
        found = self.figures.get((Path(model).name, method), {})
        comparable = set(averaged) == set(self.tasks)
        return {column: figure for column, figure in found.items() if comparable or column != MICRO}


def read_printed(file: Path, own_tasks: Collection[str] = ()) -> Printed:
    """Read a printed table: CSV with the columns `model` and `method`, one for each task that the micro-average is
    over, and if they are printed `trainable` and `micro-average`. What is not printed is left empty.

    Models and methods may be others than a comparison's, which is often a part of the table.

    Args:
        file (Path): the table.
        own_tasks (collection of str): names of tasks beside the fifteen benchmarks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is unknown or missing, a row is there twice or has other columns than the first line, or a
            figure is no percentage.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of printed figures {file}")
    with open(file, encoding="utf-8", newline="") as text:
        header, *lines = list(csv.reader(text)) or [[]]
    if header[:2] != _NAMES or len(set(header)) < len(header):
        raise ValueError(
            f"{file}: the first line must name each column once, {' and '.join(_NAMES)} first, got {header}"
        )
    columns = header[2:]
    check_keys(columns, {TRAINABLE, MICRO, *TASKS, *own_tasks}, str(file))
    figures: dict[tuple[str, str], dict[str, Decimal]] = {}
    for number, line in enumerate(lines, start=2):
        place = f"{file}, line {number}"
        if len(line) != len(header):
            raise ValueError(
                f"{place}: {len(line)} values for {len(header)} columns; a value that is not printed is empty"
            )
        key = (line[0], line[1])
        if key in figures:
            raise ValueError(f"{place}: {key[1]} of {key[0]} is there twice")
        figures[key] = {
            column: _percentage(value, f"{place}, {column}")
            for column, value in zip(columns, line[2:], strict=True)
            if value
        }
    return Printed(tuple(column for column in columns if column not in (TRAINABLE, MICRO)), figures)


def _percentage(value: str, place: str) -> Decimal:
    try:
        figure = Decimal(value)
    except InvalidOperation:
        figure = Decimal("nan")
    if not (figure.is_finite() and 0 <= figure <= 100):
        raise ValueError(f"{place}: a figure must be a number from 0 to 100, got {value!r}")
    return figure
