"""The parts of a document that a program writes: between markers, everything else is written by hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.results import ResultsError
from rosa.storage.files import replace_text


def fill(text: str, parts: Mapping[str, str]) -> str:
    """A document's text with each part between its markers.

    Raises:
        ResultsError: the document lacks a part's markers.
    """
    for name, part in parts.items():
        begin, end = f"<!-- report:{name} begin -->", f"<!-- report:{name} end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ResultsError(f"the document lacks {begin} … {end}, between which the report writes")
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


def update(document: Path, parts: Mapping[str, str]) -> None:
    """Writes each part between its markers in a document.

    Raises:
        ResultsError: the document lacks a part's markers. Nothing was written.
    """
    replace_text(document, fill(document.read_text(encoding="utf-8"), parts))


def update_or_print(name: str, about: str | None, document: Path, tables: Callable[[], Mapping[str, str]]) -> None:
    """The command line of a program whose tables are worked out anew at each call.

    Args:
        name (str): of its module.
        about (str, optional): what its help says.
        document (Path): where the tables stand.
        tables (callable): makes them, by name.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the tables and write nothing")
    only_print = parser.parse_args().only_print
    parts = tables()
    if not only_print:
        update(document, parts)
    print("\n\n".join(parts.values()))
