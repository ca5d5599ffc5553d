"""docs/commands.md from the commands' own help: `python -m tests.rosa.command_line` writes it."""

from __future__ import annotations

import contextlib
import io
import os
from importlib import import_module
from pathlib import Path

from rosa.cli import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
TEXT = """# Command line

Every command and its options, as `rosa COMMAND --help` prints them (`python -m tests.rosa.command_line` writes this
page). What goes wrong is told in a line on stderr that begins with the command's name; of wrong arguments most commands
print their usage before it. The exit status is 1, for wrong arguments 2, and 130 after Ctrl-C.

{commands}
"""
OF_TRANSFORMERS = "\noptions:"  # of `rosa train` alone; RoSA's own come first


def help_of(command: str) -> str:
    """What a command prints when it is asked for help, for a terminal of 100 columns."""
    printed = io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            import_module(f"rosa.commands.{command}").run(["--help"])
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return printed.getvalue()


def page() -> str:
    """The whole page."""
    return TEXT.format(commands="\n\n".join(_section(command, what) for command, what in COMMANDS.items()))


def _section(command: str, what: str) -> str:
    text = help_of(command).rstrip()
    if command == "train":
        text = text.partition(OF_TRANSFORMERS)[0] + "\n\nand all of transformers' TrainingArguments, such as\n"
        text += "  --output FOLDER, --config FILE, --learning_rate, --num_train_epochs, --max_steps,\n"
        text += "  --per_device_train_batch_size, --gradient_accumulation_steps, --eval_strategy, --report_to"
    return f"## rosa {command}\n\n{what[0].upper()}{what[1:]}.\n\n```\n{text}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
