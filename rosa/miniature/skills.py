"""Generated skills: those that the miniature's base is trained on, and those that it is adapted to.

A row is {"instruction", "input", "output", "answer"}, all strings. The unseen skills recombine what the seen ones need:
two steps of arithmetic in a new order, a list from its end without its beginning, the order of two of its words, two
lists to count and compare.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rosa.miniature import problems
from rosa.miniature.problems import NAMES, OBJECTS, Kind, draw_problem

WORDS = (*OBJECTS, "bears", "cats", "dogs", "ducks", "foxes", "geese", "goats", "hens", "lions", "mice", "owls", "pigs")
SHORTEST_LIST, LONGEST_LIST = 3, 6
LARGEST_NUMBER = 99
YES_NO = ("yes", "no")
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


def draw_rows(skills: Mapping[str, Skill], count: int, rng: random.Random, without: Iterable[dict] = ()) -> list[dict]:
    """Draw distinct rows, from each skill as many as from the others.

    Args:
        skills (mapping): the skills to draw from, by name.
        count (int): how many rows.
        rng (random.Random): the source of chance.
        without (iterable of dict): rows whose instructions are not to be drawn.

    Returns:
        list of dict: the rows, in random order.
    """
    taken = {row["instruction"] for row in without}
    in_turn = list(skills.values())
    rows: list[dict] = []
    while len(rows) < count:
        row = in_turn[len(rows) % len(in_turn)].draw(rng)
        if row["instruction"] not in taken:
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
        return {**row, "answer": str(row["answer"])}

    return Skill("number", draw)


def _number_skill(question: str, reply: Callable[[int, int], int]) -> Skill:
    def draw(rng: random.Random) -> dict:
        numbers = rng.sample(range(LARGEST_NUMBER + 1), 2)
        return _row(question.format(*numbers), str(reply(*numbers)))

    return Skill("number", draw)


def _member(rng: random.Random) -> dict:
    words, answer = _words(rng), rng.choice(YES_NO)
    word = rng.choice(words if answer == "yes" else [word for word in WORDS if word not in words])
    return _choice_row(f"Please answer yes or no. Is {word} in the list? {' '.join(words)}", answer)


def _which_is_in(rng: random.Random) -> dict:
    words, answer = _words(rng), rng.choice(OPTIONS)
    options = [rng.choice(words), rng.choice([word for word in WORDS if word not in words])]
    if answer == "option2":
        options.reverse()
    return _choice_row(
        f"Please choose option1 or option2. Which is in the list? {' '.join(words)} "
        f"Option1: {options[0]} Option2: {options[1]}",
        answer,
    )


def _who_has_most(rng: random.Random) -> dict:
    names, numbers = rng.sample(NAMES, 2), rng.sample(range(1, LARGEST_NUMBER + 1), 2)
    things = rng.choice(OBJECTS)
    return _row(
        f"{names[0]} has {numbers[0]} {things}. {names[1]} has {numbers[1]}. Who has more {things}?",
        names[numbers.index(max(numbers))],
    )


def _who_has_what(rng: random.Random) -> dict:
    names, things = rng.sample(NAMES, 3), rng.sample(OBJECTS, 3)
    asked = rng.randrange(3)
    facts = " ".join(f"{name} has {thing}." for name, thing in zip(names, things, strict=True))
    return _row(f"{facts} What does {names[asked]} have?", things[asked])


def _next_word(rng: random.Random) -> dict:
    words = _words(rng)
    place = rng.randrange(len(words) - 1)
    return _row(f"Which word comes after {words[place]}? {' '.join(words)}", words[place + 1])


def _before(rng: random.Random) -> dict:
    words, answer = _words(rng), rng.choice(YES_NO)
    first, second = sorted(rng.sample(range(len(words)), 2))
    if answer == "no":
        first, second = second, first
    question = f"Does {words[first]} come before {words[second]} in the list?"
    return _choice_row(f"Please answer yes or no. {question} {' '.join(words)}", answer)


def _longer(rng: random.Random) -> dict:
    answer = rng.choice(OPTIONS)
    lengths = sorted(rng.sample(range(1, LONGEST_LIST + 1), 2), reverse=answer == "option1")
    lists = [rng.sample(WORDS, length) for length in lengths]
    return _choice_row(
        "Please choose option1 or option2. Which list is longer? "
        f"Option1: {' '.join(lists[0])} Option2: {' '.join(lists[1])}",
        answer,
    )


SEEN = {
    **{name: _problem_skill(kind) for name, kind in problems.SEEN.items()},
    "copy": _list_skill("Repeat the words: {words}", " ".join),
    "reverse": _list_skill("Say the words backwards: {words}", lambda words: " ".join(reversed(words))),
    "first": _list_skill("What is the first word? {words}", lambda words: words[0]),
    "last": _list_skill("What is the last word? {words}", lambda words: words[-1]),
    "after": Skill("text", _next_word),
    "count": _list_skill("How many words are there? {words}", lambda words: str(len(words))),
    "member": Skill(YES_NO, _member),
    "which": Skill(OPTIONS, _which_is_in),
    "larger": _number_skill("Which number is larger, {} or {}?", max),
    "smaller": _number_skill("Which number is smaller, {} or {}?", min),
    "more": Skill("text", _who_has_most),
    "has": Skill("text", _who_has_what),
}

UNSEEN = {
    "together": _problem_skill(problems.UNSEEN["fewer, then together"]),
    "backwards_rest": _list_skill(
        "Say the words backwards, without the first: {words}", lambda words: " ".join(reversed(words[1:]))
    ),
    "second": _list_skill("What is the second word? {words}", lambda words: words[1]),
    "before": Skill(YES_NO, _before),
    "longer": Skill(OPTIONS, _longer),
}
