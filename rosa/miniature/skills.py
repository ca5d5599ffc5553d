"""Generated skills: those that the miniature's base is trained on, and those that it is adapted to.

A row is {"instruction", "input", "output", "answer"}, all strings. The unseen skills recombine what the seen ones need:
two steps of arithmetic in a new order, a list from its end without its beginning, both its ends, two lists to count and
compare.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rosa.miniature import problems
from rosa.miniature.problems import OBJECTS, Kind, draw_problem

WORDS = (*OBJECTS, "bears", "cats", "dogs", "ducks", "foxes", "geese", "goats", "hens", "lions", "mice", "owls", "pigs")
SHORTEST_LIST, LONGEST_LIST = 3, 6
MOST_DRAWS = 10_000  # for one row, before a skill counts as exhausted
OPTIONS = ("option1", "option2")


@dataclass(frozen=True)
class Skill:
    """One skill.

    Args:
        form (str or tuple of str): what its answers are: "number", "text", or one of these options.
        draw (callable): takes a random.Random and returns a row.
    """

    form: str | tuple[str, ...]
    draw: Callable[[random.Random], dict]


def draw_rows(
    skills: Mapping[str, Skill], count: int, rng: random.Random, *, without: Iterable[dict] = (), distinct: bool = True
) -> list[dict]:
    """Draw rows, the skills in turn.

    Args:
        skills (mapping): the skills to draw from, by name.
        count (int): how many rows.
        rng (random.Random): the source of chance.
        without (iterable of dict): rows whose instructions are not to be drawn.
        distinct (bool): draw no instruction twice.

    Returns:
        list of dict: the rows, in random order.

    Raises:
        ValueError: a skill has not so many instructions.
    """
    taken = {row["instruction"] for row in without}
    in_turn = list(skills.items())
    rows: list[dict] = []
    while len(rows) < count:
        name, skill = in_turn[len(rows) % len(in_turn)]
        draws = (skill.draw(rng) for _ in range(MOST_DRAWS))
        row = next((row for row in draws if row["instruction"] not in taken), None)
        if row is None:
            raise ValueError(f"{name} has too few instructions for {count} rows: ask for fewer")
        if distinct:
            taken.add(row["instruction"])
        rows.append(row)
    rng.shuffle(rows)
    return rows


def _row(instruction: str, answer: str) -> dict:
    return {"instruction": instruction, "input": "", "output": answer, "answer": answer}


def _choice_row(instruction: str, answer: str) -> dict:
    # The benchmarks' wording.
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _words(rng: random.Random, shortest: int = SHORTEST_LIST, longest: int = LONGEST_LIST) -> list[str]:
    return rng.sample(WORDS, rng.randint(shortest, longest))


def _list_skill(question: str, reply: Callable[[list[str]], str]) -> Skill:
    """A skill that replies to a list of words with a text; the question's {words} is the list."""

    def draw(rng: random.Random) -> dict:
        words = _words(rng)
        return _row(question.format(words=" ".join(words)), reply(words))

    return Skill("text", draw)


def _problem_skill(kind: Kind) -> Skill:
    def draw(rng: random.Random) -> dict:
        row = draw_problem(kind, rng)
        # The worked steps end in the answer: shorter rows cost less time.
        return {**row, "output": row["output"].partition(". The answer")[0], "answer": str(row["answer"])}

    return Skill("number", draw)


def _longer(rng: random.Random) -> dict:
    answer = rng.choice(OPTIONS)
    lengths = sorted(rng.sample(range(1, LONGEST_LIST + 1), 2), reverse=answer == "option1")
    lists = [rng.sample(WORDS, length) for length in lengths]
    return _choice_row(
        f"Which list is longer? Option1: {' '.join(lists[0])} Option2: {' '.join(lists[1])}",
        answer,
    )


SEEN = {
    **{name: _problem_skill(kind) for name, kind in problems.SEEN.items() if len(kind.steps) == 1},
    "sum": _problem_skill(Kind(("a + b", "x - c"), ("What is {a} + {b} - {c}?",))),
    "difference": _problem_skill(Kind(("a - b", "x + c"), ("What is {a} - {b} + {c}?",))),
    "copy": _list_skill("Repeat the words: {words}", " ".join),
    "reverse": _list_skill("Say the words backwards: {words}", lambda words: " ".join(reversed(words))),
    "first": _list_skill("What is the first word? {words}", lambda words: words[0]),
    "last": _list_skill("What is the last word? {words}", lambda words: words[-1]),
    "count": _list_skill("How many words are there? {words}", lambda words: str(len(words))),
}

UNSEEN = {
    "together_fewer": _problem_skill(
        Kind(("a - b", "a + x"), ("{who} has {a} {things}. {other} has {b} fewer. How many do they have together?",))
    ),
    "backwards_rest": _list_skill(
        "Say the words backwards, without the first: {words}", lambda words: " ".join(reversed(words[1:]))
    ),
    "ends": _list_skill("What are the first and the last word? {words}", lambda words: f"{words[0]} {words[-1]}"),
    "longer": Skill(OPTIONS, _longer),
}
