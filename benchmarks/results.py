"""Rows of measurements as data: how they are written while they come, and how they are read back.

A file is one run on one machine: the machine, versions and commit, and under "rows" flat objects of labels and numbers.
Every row has LABELS, and the numbers of its group.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
COUNTED = RESULTS / "counted" / "decoder_layer.json"  # of `python -m benchmarks.static --save`
MIXED = RESULTS / "counted" / "mixed_batch.json"  # of `python -m benchmarks.mixed_batch --save`
RESPONSE_LOGITS = RESULTS / "counted" / "response_logits.json"  # of `python -m benchmarks.response_logits --save`
TEXTS = ("group", "provider", "mode", "shape")
LABELS = (*TEXTS, "batch", "seq")
ERRORS = ("output_max_abs", "output_relative_l2", "gradient_max_abs", "gradient_relative_l2")
# What a row has besides its labels, by group; rows of the mode "accuracy" have ERRORS.
NUMBERS = {
    "rope_roae": ("milliseconds",),  # and, of the fused op, as in the next two, the `bytes` that it must move
    "roae": ("milliseconds",),
    "road": ("milliseconds",),
    "launch_shape": ("milliseconds",),
    "attention": ("milliseconds",),
    "decoder_layer": ("milliseconds",),
    "training_step": ("milliseconds", "tokens_per_second", "trainable_parameters", "peak_bytes", "flops"),
    "decode": ("milliseconds", "tokens_per_second"),
    "copy": ("milliseconds", "bytes"),
    "matmul": ("milliseconds", "flops"),
    "mixed_batch": ("milliseconds", "tokens_per_second"),
    "mixed_batch_counted": ("adapters", "launches"),
    "response_logits": ("flops", "logits_bytes", "labelled"),
    "counted": ("forward", "backward", "decode", "saved_per_token", "saved_besides"),
}
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
        """Keeps one row; it must have the labels and numbers of its group."""
        if fault := _fault(row):
            raise ValueError(f"{fault}: {row}")
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
        ResultsError: no such file, no JSON, or a row without the labels and numbers of its group.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file; `pytest benchmarks` or `bash benchmarks/gpu.sh` makes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not a JSON file of results ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ResultsError(f'{path}: a file of results is an object with a list "rows"')
    if not isinstance(content.get("device"), str):
        raise ResultsError(f'{path}: a file of results names the machine in "device"')
    rows = content.pop("rows")
    for number, row in enumerate(rows, start=1):
        if fault := _fault(row):
            raise ResultsError(f"{path}, row {number}: {fault}")
    return Run(path, content, rows)


def _fault(row: object) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"a row is an object, got {row!r}"
    if missing := [label for label in LABELS if label not in row]:
        return f"lacks {', '.join(missing)}"
    if row["group"] not in NUMBERS:
        return f"group must be one of {', '.join(NUMBERS)}, got {row['group']!r}"
    if missing := [n for n in (ERRORS if row["mode"] == "accuracy" else NUMBERS[row["group"]]) if n not in row]:
        return f"lacks {', '.join(missing)}"
    for name, value in row.items():
        if name in TEXTS:
            if not isinstance(value, str):
                return f"{name} must be a text, got {value!r}"
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            if not (name == "peak_bytes" and value is None):  # a CPU's
                return f"{name} must be a number, got {value!r}"
        elif not math.isfinite(value) or (name == "milliseconds" and value <= 0):
            return f"{name} must be finite, and a time positive, got {value}"
    return None


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
        "driver": _output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
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


class Machine:
    """All that is known of one device: for each group of rows the newest run that has it."""

    def __init__(self, device: str, runs: Sequence[Run]):
        self.device = device
        self.runs: dict[str, Run] = {}
        for run in sorted(runs, key=lambda run: (run.environment.get("date") or "", run.path.name)):
            self.runs |= {row["group"]: run for row in run.rows}

    def rows(self, group: str, **labels: object) -> list[Row]:
        """The rows of a group whose labels are as given."""
        rows = self.runs[group].rows if group in self.runs else []
        return [row for row in rows if row["group"] == group and labels.items() <= row.items()]

    def find(self, group: str, **labels: object) -> Row | None:
        """The last row of a group whose labels are as given."""
        rows = self.rows(group, **labels)
        return rows[-1] if rows else None

    def rate(self, group: str, what: Literal["bytes", "flops"]) -> float | None:
        """Bytes or operations a second that a copy or a matrix product reached in the run that the group is from."""
        limit = {"bytes": "copy", "flops": "matmul"}[what]
        row = next((row for row in self.runs[group].rows if row["group"] == limit), None)
        return None if row is None else row[what] / row["milliseconds"] * 1e3


def machines(runs: Sequence[Run]) -> list[Machine]:
    """The runs by device, GPUs only: CPU times say nothing about a GPU."""
    devices = sorted({run.environment["device"] for run in runs if not run.environment["device"].startswith("cpu")})
    return [Machine(device, [run for run in runs if run.environment["device"] == device]) for device in devices]
