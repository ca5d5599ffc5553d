"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_NAME = ".lock"


@contextmanager
def alone_in(folder: Path, lock_name: str = LOCK_NAME) -> Iterator[None]:
    """Keeps other processes that ask from working in a folder, for the time of the block. However the process ends, the
    lock ends with it; its file stays.

    Args:
        folder (Path): made if need be.
        lock_name (str): the lock's file; locks of different names do not exclude each other.

    Raises:
        ValueError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / lock_name, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process is at work in {folder}: wait until it has ended, or choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
