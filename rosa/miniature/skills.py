"""Generated skills: those that the miniature's base is trained on, and those that it is adapted to.

A row is {"instruction", "input", "output", "answer"}, all strings. The unseen skills recombine what the seen ones need,
and answer in forms that the seen ones have: two steps of arithmetic in a new order, a list from its end without its
beginning, both its ends, which of two lists is longer, whether a word is in a list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rosa.miniature import problems
from rosa.miniature.problems import OBJECTS, Kind, draw_problem

WORDS = (*OBJECTS, "bears", "cats", "dogs", "ducks", "foxes", "geese", "goats", "hens", "lions", "mice", "owls", "pigs")
SHORTEST_LIST, LONGEST_LIST = 3, 5
MOST_DRAWS = 10_000  # for one row, before a skill counts as exhausted
OPTIONS = ("option1", "option2")
TRUTHS = ("true", "false")


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


def _words(rng: random.Random) -> list[str]:
    return rng.sample(WORDS, rng.randint(SHORTEST_LIST, LONGEST_LIST))


def _list_skill(question: str, reply: Callable[[list[str]], Sequence[str]]) -> Skill:
    """A skill that replies to a list of words with words; the question's {words} is the list."""

    def draw(rng: random.Random) -> dict:
        words = _words(rng)
        # Words are never the first of an answer: a token with a space before it is another than one without.
        return _row(question.format(words=" ".join(words)), f"the answer is {' '.join(reply(words))}")

    return Skill("text", draw)


def _truth_skill(question: str, split: Callable[[list[str]], tuple[list[str], list[str]]]) -> Skill:
    """A skill that says whether something is true of a {word}; half the time it is.

    Args:
        question (str): the question.
        split (callable): takes the list, and returns the words of which it is true and those of which it is not.
    """

    def draw(rng: random.Random) -> dict:
        words, answer = _words(rng), rng.choice(TRUTHS)
        word = rng.choice(split(words)[TRUTHS.index(answer)])
        return _choice_row(f"{question.format(word=word)} {' '.join(words)}", answer)

    return Skill(TRUTHS, draw)


def _options_skill(question: str, about: Callable[[list[str]], object]) -> Skill:
    """A skill that says which of two lists is meant; the question's {about} is what is told of it."""

    def draw(rng: random.Random) -> dict:
        meant, other = _two_lists(rng)
        return _options_row(question.format(about=about(meant)), meant, other, rng)

    return Skill(OPTIONS, draw)


def _longer(rng: random.Random) -> dict:
    shorter, longer = sorted(_two_lists(rng), key=len)
    return _options_row("Which list is longer?", longer, shorter, rng)


def _two_lists(rng: random.Random) -> tuple[list[str], list[str]]:
    """Lists of different lengths that share no word."""
    one, other = rng.sample(range(SHORTEST_LIST - 1, LONGEST_LIST + 1), 2)
    words = rng.sample(WORDS, one + other)
    return words[:one], words[one:]


def _options_row(question: str, meant: list[str], other: list[str], rng: random.Random) -> dict:
    answer = rng.choice(OPTIONS)
    one, two = (meant, other) if answer == "option1" else (other, meant)
    return _choice_row(f"{question} Option1: {' '.join(one)} Option2: {' '.join(two)}", answer)


def _problem_skill(*kinds: Kind) -> Skill:
    def draw(rng: random.Random) -> dict:
        row = draw_problem(rng.choice(kinds), rng)
        # The worked steps end in the answer: shorter rows cost less time.
        return {**row, "output": row["output"].partition(". The answer")[0], "answer": str(row["answer"])}

    return Skill("number", draw)


SEEN = {
    "one_step": _problem_skill(*(kind for kind in problems.SEEN.values() if len(kind.steps) == 1)),
    "two_steps": _problem_skill(*(kind for kind in problems.SEEN.values() if len(kind.steps) == 2)),
    "sum": _problem_skill(Kind(("a + b", "x - c"), ("What is {a} + {b} - {c}?",))),
    "difference": _problem_skill(Kind(("a - b", "x + c"), ("What is {a} - {b} + {c}?",))),
    "copy": _list_skill("Repeat the words: {words}", lambda words: words),
    "rest": _list_skill("Repeat the words, without the first: {words}", lambda words: words[1:]),
    "reverse": _list_skill("Say the words backwards: {words}", lambda words: words[::-1]),
    "backwards_most": _list_skill("Say the words backwards, without the last: {words}", lambda words: words[-2::-1]),
    "first": _list_skill("What is the first word? {words}", lambda words: words[:1]),
    "last": _list_skill("What is the last word? {words}", lambda words: words[-1:]),
    "first_second": _list_skill("What are the first and the second word? {words}", lambda words: words[:2]),
    "count": _list_skill("How many words are there? {words}", lambda words: [str(len(words))]),
    "is_first": _truth_skill("Is {word} the first word?", lambda words: (words[:1], words[1:])),
    "is_last": _truth_skill("Is {word} the last word?", lambda words: (words[-1:], words[:-1])),
    "begins": _options_skill("Which list begins with {about}?", lambda words: words[0]),
    "has_count": _options_skill("Which list has {about} words?", len),
}

UNSEEN = {
    "together_fewer": _problem_skill(
        Kind(("a - b", "a + x"), ("{who} has {a} {things}. {other} has {b} fewer. How many do they have together?",))
    ),
    "backwards_rest": _list_skill("Say the words backwards, without the first: {words}", lambda words: words[:0:-1]),
    "ends": _list_skill("What are the first and the last word? {words}", lambda words: [words[0], words[-1]]),
    "longer": Skill(OPTIONS, _longer),
    "contains": _truth_skill(
        "Is {word} one of the words?", lambda words: (words, [word for word in WORDS if word not in words])
    ),
}
