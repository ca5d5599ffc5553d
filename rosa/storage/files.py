"""Files that are whole or not there: written beside their place under a fresh name, and put there at once."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

# Older files of an unfinished write are what a killed process has left.
_LEFT_BEHIND_SECONDS = 3600


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Writes files, each whole; all are on the disk before the first takes its place, in the order given.

    Links are never followed: one that stands at a path gives way to the file.

    Args:
        contents (mapping of Path to bytes): what to write; the folders are there.

    Raises:
        OSError: a file could not be written. Those in place before are whole.
    """
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            with open(temporary, "xb") as file:  # exclusively: not through a link that somebody put there
                written[path] = temporary
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for path, temporary in written.items():
            temporary.unlink(missing_ok=True)
            _remove_left_behind(path)


def replace_text(path: Path, text: str) -> None:
    """Writes one file of text in UTF-8, as `replace_files` does."""
    replace_files({path: text.encode("utf-8")})


def _remove_left_behind(path: Path) -> None:
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        try:
            if time.time() - temporary.lstat().st_mtime > _LEFT_BEHIND_SECONDS:
                temporary.unlink()
        except OSError:  # gone by now, or not ours to remove
            continue
