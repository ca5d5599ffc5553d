"""Test questions that are training rows: right answers to them may be recalled, and tell little of what was learnt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# A number with its decimals, a word, a sign; of hyphens those before a number.
_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+|[+*/^=<>\u00d7÷\u2212%]|-(?=\s*\d)")


def seen(tests: Sequence[Mapping], training: Sequence[Mapping]) -> list[bool]:
    """Of each test row, whether its question is that of a training row: the same words, numbers and signs of
    arithmetic, however they are punctuated, spaced and spelt in capitals.

    Args:
        tests, training (sequence of mapping): rows with `instruction` and perhaps `input`.
    """
    asked = {words(row) for row in training}
    return [words(row) in asked for row in tests]


def told(shares: Mapping[str, float]) -> str:
    """What is said of the share of each task's questions that is among the training rows, in percent; or nothing."""
    found = ", ".join(f"{name} {share:.0f} %" for name, share in shares.items() if share)
    if not found:
        return ""
    return (
        f"Among the training rows, word for word, are these shares of the questions: {found}. Those that differ from a "
        "training row in numbers or names alone are not counted."
    )


def words(row: Mapping) -> str:
    """A row's question by its words, numbers and signs of arithmetic alone."""
    return " ".join(_WORD.findall(f"{row['instruction']} {row.get('input') or ''}".lower()))
