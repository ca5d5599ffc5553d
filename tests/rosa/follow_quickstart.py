"""Follows docs/quickstart.md word for word, in the current folder: `python -m tests.rosa.follow_quickstart`.

Files are written as they stand in the page, commands run in their order, Python is executed. Prints what each printed.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

from rosa.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def follow(text: str) -> None:
    """Does what the page says."""
    for language, file, block in BLOCK.findall(text):
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(block, encoding="utf-8")
        elif language == "python":
            print(">>>", flush=True)
            exec(block, {})
        else:
            for line in re.findall(r"^\$ (.+)$", block, re.MULTILINE):
                print("$", line, flush=True)
                run(shlex.split(line))


def run(words: list[str]) -> None:
    """One command, such as `rosa info` or `echo question | rosa chat`."""
    if words[0] == "echo":
        sys.stdin = io.StringIO(words[1] + "\n")
        words = words[words.index("|") + 1 :]
    assert words[0] == "rosa", words
    main(words[1:])


if __name__ == "__main__":
    follow(PAGE.read_text(encoding="utf-8"))
