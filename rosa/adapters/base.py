"""Which base an adapter was made for: written beside it, and found again by those who have the adapter alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

# As peft's configurations call them; the second is the commit of a base on the hub.
NAME, REVISION = "base_model_name_or_path", "revision"


class Base(NamedTuple):
    """A base model: its folder or Hub name, and there the branch, tag or commit; None is "main"."""

    name: str
    revision: str | None = None


def describe_origin(model: nn.Module) -> dict[str, str | None]:
    """Where a model was loaded from, as far as it knows: the fields of an adapter's description.

    Args:
        model (nn.Module): the plain model, without wrappers.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None) or None
    if name is not None and os.path.isdir(name):
        name = os.path.abspath(name)  # or it would be another folder, or a name on the hub, for who is elsewhere
    return {NAME: name, REVISION: getattr(config, "_commit_hash", None)}


def find_base(descriptions: Mapping[Path, Mapping[str, Any]], given: str | None = None) -> Base:
    """The base of adapters that are to stand in one model.

    Args:
        descriptions (mapping): what each adapter's folder says of it, RoSA's or peft's.
        given (str, optional): a folder or Hub name that counts instead of what they say.

    Raises:
        ValueError: an adapter names no base, or they name different ones.
    """
    if given is not None:
        return Base(given)
    found = {}
    for folder, description in descriptions.items():
        name, revision = description.get(NAME), description.get(REVISION)
        if not name or not isinstance(name, str):
            raise ValueError(f"the adapter in {folder} does not say what base it was made for: {_remedy()}")
        found[folder] = Base(name, revision if isinstance(revision, str) else None)
    if len(set(found.values())) > 1:
        both = "; ".join(
            f"{folder} names {base.name}" + (f" at {base.revision}" if base.revision else "")
            for folder, base in found.items()
        )
        raise ValueError(f"the adapters were made for different bases ({both}): {_remedy()}")
    return next(iter(found.values()))


@contextmanager
def base_named_by(adapters: Iterable[Path], given: str | None) -> Iterator[None]:
    """A block that loads the base of adapters; where they name it, and it cannot be had, the error says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        if given is not None:
            raise
        raise type(error)(
            f"{error}. The adapter in {' and '.join(map(str, adapters))} names this base: {_remedy()}"
        ) from error


def _remedy() -> str:
    return "give the base, with base= in Python or --model on the command line"
