"""What an adapter's folder says of the run that trained it, in figures for its card."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from rosa.storage.parsing import parse_object

STATE_NAME = "trainer_state.json"  # transformers' Trainer's
_SETTINGS = "checkpoint-*/made_with.json"


def run_figures(folder: Path) -> dict[str, str]:
    """Figures by what they are, in words; none where the folder holds no state of a Trainer.

    Args:
        folder (Path): the adapter's, or a checkpoint's.

    Raises:
        ValueError: a file is damaged.
    """
    if not (folder / STATE_NAME).is_file():
        return {}
    state = _read(folder / STATE_NAME)
    history = state.get("log_history")
    history = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    losses, validation = _course(history, "loss"), _course(history, "eval_loss")
    rates = [rate for _, rate in _course(history, "learning_rate")]
    rate = _settings(folder).get("learning_rate")
    figures = {
        "steps": _number(state.get("global_step")),
        "epochs": _number(state.get("epoch")),
        "tokens seen": _number(state.get("num_input_tokens_seen") or None),
        "learning rate": _number(rate if _is_number(rate) else max(rates, default=None)),
        "training loss, first logged": _at(losses[:1]),
        "training loss, last logged": _at(losses[-1:]),
        "validation loss, lowest": _at(sorted(validation, key=lambda point: point[1])[:1]),
        "validation loss, last": _at(validation[-1:]),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _course(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(e["step"], e[name]) for e in history if _is_number(e.get(name)) and _is_number(e.get("step"))]


def _settings(folder: Path) -> dict[str, Any]:
    """Those that the last checkpoint was made with."""
    files = {int(re.sub(r"\D", "", file.parent.name) or 0): file for file in folder.glob(_SETTINGS)}
    return _read(files[max(files)]) if files else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        return parse_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> str | None:
    if not _is_number(value):
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _at(points: list[tuple[int, float]]) -> str | None:
    return f"{points[0][1]:.4f} (step {points[0][0]})" if points else None
