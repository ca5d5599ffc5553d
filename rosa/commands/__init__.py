"""The sub-commands of `rosa`, a file each: `run(argv)` parses the command's arguments and does its work."""

from __future__ import annotations

import argparse

from rosa.models.quantizing import LOAD_IN

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `rosa COMMAND`, without any argument yet."""
    return argparse.ArgumentParser(f"rosa {command}", description=description, allow_abbrev=False)


def check_counts(options: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Ends the command, naming the option, where one of these is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            options.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")


def check_texts(options: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Ends the command, naming the option, where one of these is given and was no UTF-8 on the command line."""
    from rosa.evaluation.generation import check_text

    for name in names:
        try:
            check_text(getattr(args, name) or "")
        except ValueError as error:
            options.error(f"argument --{name}: must be text in UTF-8: {error}")


def add_load_in(options: argparse.ArgumentParser) -> None:
    """Adds `--load-in`, which `rosa train` has too."""
    options.add_argument(
        "--load-in",
        "--load_in",
        choices=LOAD_IN,
        help="quantize the base while it is loaded; default: as it was saved",
    )
