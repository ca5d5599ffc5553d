"""Settings in YAML files: reading them, and telling a reader which key is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


def load_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path (Path): the file.

    Returns:
        dict: its keys and values as YAML reads them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not one mapping with strings for keys.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return mapping(settings, str(path))


def mapping(value: object, place: str) -> dict[str, Any]:
    """The value, if it is a mapping with strings for keys.

    Args:
        value (object): what a settings file holds at a place; None stands for an empty mapping.
        place (str): named by the error.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{place} must hold keys and values (`key: value`), got {value!r}")
    return value


def mapping_or_file(value: object, place: str, folder: Path) -> dict[str, Any]:
    """The mapping at a place of a settings file, or in the YAML file that is named there, as seen from the folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    return load_settings(folder / value) if isinstance(value, str) else mapping(value, place)


def check_keys(given: Iterable[str], known: Iterable[str], place: str) -> None:
    """Refuse a key that nobody reads, and name the nearest one that is.

    Args:
        given (iterable of str): the keys found.
        known (iterable of str): the keys that mean something there.
        place (str): named by the error.

    Raises:
        ValueError: a key is unknown.
    """
    known = sorted(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{place}: unknown key {key}; {hint}")


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that say what these settings say: `{"seed": 7}` is `["--seed", "7"]`.

    A list becomes several words, a mapping JSON, true and false these words; a key without a value is left out.
    """
    arguments = []
    for key, value in settings.items():
        if value is None:
            continue
        words = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *(_word(word) for word in words)]
    return arguments


def _word(value: Any) -> str:
    if isinstance(value, (dict, bool)):
        return json.dumps(value, default=str)  # a date, for YAML
    return str(value)
