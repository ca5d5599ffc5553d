"""Rows of measurements as data: how they are written while they come, and how they are read back.

A file is one run on one machine: the machine, versions and commit, and under "rows" flat objects of labels and numbers.
Every row has `group`, `provider`, `mode`, `shape`, `batch` and `seq`; what else it has is up to its group.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
LABELS = ("group", "provider", "mode", "shape", "batch", "seq")
PACKAGES = ("torch", "triton", "transformers", "peft", "liger_kernel")

Row = dict[str, Any]


class Run(NamedTuple):
    """One file of results. `environment` is what `environment()` gave on the machine that it is from."""

    path: Path
    environment: dict[str, str | None]
    rows: list[Row]


class ResultsError(ValueError):
    """A file of results that is missing or not as it should be; the message names the file and what to do."""


class Recorder:
    """Writes the rows of this run, the whole file anew at every row, so that a run that is killed keeps what it had."""

    def __init__(self, path: Path | None = None):
        folder = RESULTS / device_name().replace(" ", "_").lower()
        self.path = path or folder / f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}.json"
        self.rows: list[Row] = []
        self._environment: dict[str, str | None] = {}

    def add(self, row: Row) -> None:
        """Keeps one row, which must have the labels that every row has."""
        if missing := [label for label in LABELS if label not in row]:
            raise ValueError(f"a row needs {', '.join(missing)}: {row}")
        self._environment = self._environment or environment()
        self.rows.append(row)
        write(self.path, self._environment, self.rows)


def write(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """Writes a file of results, one row a line, by way of a second file: readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n{head} "rows": [\n{body}\n ]\n}}\n')
    partial.replace(path)


def read(path: Path) -> Run:
    """Reads and checks one file of results.

    Raises:
        ResultsError: no such file, no JSON, or a row without its labels or with numbers that are none.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file; `pytest benchmarks` or `bash benchmarks/gpu.sh` makes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not a JSON file of results ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or "device" not in content:
        raise ResultsError(f'{path}: a file of results is an object with "device" and a list "rows"')
    rows = content.pop("rows")
    for number, row in enumerate(rows, start=1):
        _check(path, number, row)
    return Run(path, content, rows)


def _check(path: Path, number: int, row: object) -> None:
    if not isinstance(row, dict):
        raise ResultsError(f"{path}, row {number}: a row is an object, got {row!r}")
    if missing := [label for label in LABELS if label not in row]:
        raise ResultsError(f"{path}, row {number}: lacks {', '.join(missing)}")
    for label in ("group", "provider", "mode", "shape"):
        if not isinstance(row[label], str):
            raise ResultsError(f"{path}, row {number}: {label} must be a text, got {row[label]!r}")
    for label in row.keys() - {"group", "provider", "mode", "shape"}:
        is_number = isinstance(row[label], (int, float)) and not isinstance(row[label], bool)
        if row[label] is not None and not is_number:
            raise ResultsError(f"{path}, row {number}: {label} must be a number or null, got {row[label]!r}")
    time = row.get("milliseconds")
    if time is not None and not 0 < time < float("inf"):
        raise ResultsError(f"{path}, row {number}: milliseconds must be positive, got {time}")


def device_name() -> str:
    """The GPU's name, or "cpu" and the processor's architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"


def environment() -> dict[str, str | None]:
    """Machine, date, driver, commit and versions, for the record; None for what cannot be told.

    The commit is git's, or what the environment variable COMMIT says, for a copy of the tree without its history.
    """
    commit = os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty", "--exclude=*")
    return {
        "device": device_name(),
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": commit,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
