"""The sub-commands of `rosa`, a file each: `run(argv)` parses the command's arguments and does its work."""

from __future__ import annotations

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `rosa COMMAND`, without any argument yet."""
    return argparse.ArgumentParser(f"rosa {command}", description=description, allow_abbrev=False)
