"""A comparison's file with some of its settings changed from the command line: to try one cell, or to run a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rosa.storage.settings import check_keys, mapping_or_file


def parse_changes(words: Iterable[str]) -> dict[str, Any]:
    """Changes by key from words `KEY=VALUE`; the value is read as YAML.

    Raises:
        ValueError: a word is not in this form.
    """
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {word}: the value is not valid YAML: {error}") from error
        if not (key and equals):
            raise ValueError(f"--set takes KEY=VALUE, got {word!r}")
    return changes


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with other values; dots in a key lead into a mapping (`train.max_steps`), also into one in a file of
    its own, which is named as seen from the folder.

    Raises:
        FileNotFoundError, ValueError: a key leads into a value that is neither a mapping nor the file of one.
    """
    found = dict(settings)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        found[first] = (
            changed(mapping_or_file(found.get(first), first, folder), {rest: value}, folder) if rest else value
        )
    return found


def only(methods: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """These of the methods, in the file's order; all if none is named.

    Raises:
        ValueError: there is no method of a name.
    """
    check_keys(names, methods, "--only")
    return {name: options for name, options in methods.items() if name in names or not names}
