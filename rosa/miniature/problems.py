"""Arithmetic word problems from a seed: the kinds a base model is trained on, and one it has not seen.

A problem is a row {"instruction", "input", "output", "answer"}. Its output is a short worked solution that ends in the
number: "12 - 5 = 7. 12 + 7 = 19. The answer is 19". The answer is that number as an int.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

NAMES = (
    "Ann",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jonas",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
)
OBJECTS = (
    "apples",
    "books",
    "coins",
    "eggs",
    "marbles",
    "nuts",
    "pencils",
    "plums",
    "shells",
    "stamps",
    "toys",
    "tickets",
)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

# Few enough number facts that a model learns them in a minute or two on a CPU.
LARGEST_NUMBER = 12
LARGEST_RESULT = 24


@dataclass(frozen=True)
class Kind:
    """One kind of problem.

    Args:
        steps (tuple of str): the solution, an operation a step, over the problem's numbers a, b, c and the results x, y
            of the first and second step.
        templates (tuple of str): wordings with the fields {a}, {b}, {c}, {who}, {other} and {things}.
    """

    steps: tuple[str, ...]
    templates: tuple[str, ...]


SEEN = {
    "gain": Kind(
        ("a + b",),
        (
            "{who} has {a} {things}. {who} buys {b} more. How many {things} does {who} have now?",
            "{who} had {a} {things} and then found {b} more. How many {things} does {who} have now?",
        ),
    ),
    "loss": Kind(
        ("a - b",),
        (
            "{who} has {a} {things}. {who} gives {b} to {other}. How many {things} does {who} have now?",
            "{who} had {a} {things} and then lost {b}. How many {things} does {who} have now?",
        ),
    ),
    "more": Kind(
        ("a + b",),
        (
            "{who} has {a} {things}. {other} has {b} more than {who}. How many {things} does {other} have?",
            "{other} has {b} more {things} than {who}. {who} has {a}. How many {things} does {other} have?",
        ),
    ),
    "fewer": Kind(
        ("a - b",),
        (
            "{who} has {a} {things}. {other} has {b} fewer than {who}. How many {things} does {other} have?",
            "{other} has {b} fewer {things} than {who}. {who} has {a}. How many {things} does {other} have?",
        ),
    ),
    "together": Kind(
        ("a + b",),
        (
            "{who} has {a} {things}. {other} has {b}. How many {things} do they have together?",
            "{who} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
        ),
    ),
    "boxes": Kind(
        ("a * b",),
        (
            "{who} has {a} boxes with {b} {things} in each. How many {things} does {who} have?",
            "There are {a} boxes. {who} puts {b} {things} into each. How many {things} are in the boxes?",
        ),
    ),
    "gain, then loss": Kind(
        ("a + b", "x - c"),
        (
            "{who} has {a} {things}, buys {b} more and gives {c} to {other}. How many {things} does {who} have now?",
            "{who} had {a} {things}, then found {b} more and lost {c}. How many {things} does {who} have now?",
        ),
    ),
    "loss, then gain": Kind(
        ("a - b", "x + c"),
        (
            "{who} has {a} {things}, gives {b} to {other} and buys {c} more. How many {things} does {who} have now?",
            "{who} had {a} {things}, then lost {b} and found {c} more. How many {things} does {who} have now?",
        ),
    ),
}

UNSEEN = {
    "fewer, then together": Kind(
        ("a - b", "a + x"),
        (
            "{who} has {a} {things}. {other} has {b} fewer than {who}. How many {things} do they have together?",
            "{other} has {b} fewer {things} than {who}. {who} has {a}. How many {things} do they have together?",
        ),
    ),
}


class Problems(NamedTuple):
    """Rows to train on, and held-out rows whose questions are not among them."""

    train: list[dict]
    held_out: list[dict]


def generate(kinds: dict[str, Kind], train: int, held_out: int, seed: int) -> Problems:
    """Draw distinct problems, the kinds in turn.

    Args:
        kinds (dict): the kinds to draw from, `SEEN` or `UNSEEN`.
        train (int): how many problems to train on.
        held_out (int): how many to hold out.
        seed (int): the same seed gives the same problems.

    Returns:
        Problems: both sets, in random order.
    """
    rng = random.Random(seed)
    rows: dict[str, dict] = {}
    while len(rows) < train + held_out:
        for kind in kinds.values():
            row = draw_problem(kind, rng)
            rows[row["instruction"]] = row
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return Problems(shuffled[:train], shuffled[train : train + held_out])


def final_number(text: str) -> int | None:
    """The number that a worked solution ends in, or None if it ends in none."""
    match = re.search(r"(-?\d+)\.?\s*$", text)
    return int(match.group(1)) if match else None


def exact_match(outputs: Sequence[str], rows: Sequence[dict]) -> float:
    """Share of outputs, in percent, that end in their problem's right number."""
    right = sum(final_number(output) == row["answer"] for output, row in zip(outputs, rows, strict=True))
    return 100 * right / len(rows)


def draw_problem(kind: Kind, rng: random.Random) -> dict:
    """One problem of this kind, as a row."""
    numbers, lines = _numbers(kind, rng)
    who, other = rng.sample(NAMES, 2)
    question = rng.choice(kind.templates).format(who=who, other=other, things=rng.choice(OBJECTS), **numbers)
    answer = lines[-1].rpartition(" ")[2]
    return {
        "instruction": question,
        "input": "",
        "output": f"{'. '.join(lines)}. The answer is {answer}",
        "answer": int(answer),
    }


def _numbers(kind: Kind, rng: random.Random) -> tuple[dict[str, int], list[str]]:
    """Numbers whose results all lie in 1..LARGEST_RESULT, and the worked steps."""
    while True:
        values = {name: rng.randint(2, LARGEST_NUMBER) for name in "abc"}
        lines = []
        for result, step in zip("xy", kind.steps, strict=False):
            left, sign, right = step.split()
            values[result] = OPERATIONS[sign](values[left], values[right])
            lines.append(f"{values[left]} {sign} {values[right]} = {values[result]}")
        if all(1 <= value <= LARGEST_RESULT for value in values.values()):
            return {name: values[name] for name in "abc"}, lines
