"""The place that --output names, looked at before any model is loaded."""

from __future__ import annotations

import os
from pathlib import Path


def check_output(folder: Path, output: Path | None = None) -> None:
    """Refuses a folder that can neither be written into nor be made. Nothing is made yet.

    Args:
        folder (Path): what is to be written into.
        output (Path, optional): what --output said, if that is a file in the folder.

    Raises:
        ValueError: it is no folder, it would have to be made in something else, or nothing may be written there.
    """
    given = f"--output {folder if output is None else output}"
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        fault = "is not a folder" if there == (output or folder) else f"cannot be made, as {there} is not a folder"
        raise ValueError(f"{given} {fault}: choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{given} cannot be written, as nothing may be written into {there}: choose another place")
