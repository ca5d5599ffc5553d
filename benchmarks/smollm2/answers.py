"""The answers to word problems, question by question: how like the training rows a question is, and pairs of methods.

    python -m benchmarks.smollm2.answers

reads the predictions that `rosa compare` left beside its results, those of the first seed, and keeps them as tables of
zeros and ones; `benchmarks.smollm2.report` makes its tables of these alone.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from benchmarks.smollm2.study import LONG, ROOT, Study
from benchmarks.tables import markdown
from rosa.comparison.overlap import words
from rosa.data.rows import load_rows
from rosa.storage.files import replace_text

KEPT = ROOT / "benchmarks" / "results" / "smollm2" / "inspection"
COMPARISONS = ("arithmetic", LONG)
HARD = "gsm8k"  # which none of the methods learns
FAR = 0.5
BANDS = ((1.0, math.inf), (0.9, 1.0), (0.7, 0.9), (FAR, 0.7), (0.0, FAR))


class Question(NamedTuple):
    """A test question.

    Attributes:
        task (str): of the test.
        likeness (float): to the training question that is most like it, from 0 to 1; see `likeness`.
        right (dict): of each method whether it answered rightly.
    """

    task: str
    likeness: float
    right: dict[str, bool]


def likeness(asked: Sequence[Mapping], training: Iterable[Mapping]) -> list[float]:
    """Of each test row, the greatest share of triples of neighbouring words, all numbers alike, that its question and a
    training question have in common, out of those of both (Jaccard's index): 1 if but their numbers differ.

    Args:
        asked, training (iterable of mapping): rows with `instruction` and perhaps `input`.
    """
    known = [_triples(row) for row in training]
    having = defaultdict(list)
    for at, triples in enumerate(known):
        for triple in triples:
            having[triple].append(at)
    found = []
    for triples in map(_triples, asked):
        common = Counter(at for triple in triples for at in having.get(triple, ()))
        shares = (n / (len(triples) + len(known[at]) - n) for at, n in common.items())
        found.append(max(shares, default=0.0))
    return found


def _triples(row: Mapping) -> set[tuple[str, ...]]:
    masked = ["#" if re.fullmatch(r"\d+", word) else word for word in words(row).split()]
    return set(zip(masked, masked[1:], masked[2:], strict=False)) or {tuple(masked)}


def collect(name: str) -> None:
    """Write the table of answers from the predictions that lie beside a comparison's results.

    Args:
        name (str): of COMPARISONS.
    """
    study = Study(name)
    comparison, (model,) = study.comparison, study.comparison.models
    seed = comparison.seeds[0]
    methods = [name for name in study.rates if any(outcome["seed"] == seed for outcome in study.tested[name])]
    folders = [comparison.cell(model, name, seed, study.rates[name]).folder for name in methods]
    training = load_rows(comparison.cell(model, methods[0], seed).settings["data"])
    lines = ["task,likeness," + ",".join(methods)]
    for task in comparison.tasks.split(","):
        made = [_read(ROOT / folder / "predictions" / f"{task}.jsonl") for folder in folders]
        for like, answers in zip(likeness(made[0], training), zip(*made, strict=True), strict=True):
            lines.append(f"{task},{like:.3f}," + ",".join(str(int(answer["correct"])) for answer in answers))
    replace_text(_file(name), "\n".join(lines) + "\n")


def _file(name: str) -> Path:
    return KEPT / f"answers-{name}.csv"


def _read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def read(name: str) -> list[Question]:
    """The questions and answers that are kept of one of COMPARISONS."""
    with open(_file(name), encoding="utf-8", newline="") as file:
        return [
            Question(row.pop("task"), float(row.pop("likeness")), {name: found == "1" for name, found in row.items()})
            for row in csv.DictReader(file)
        ]


def likeness_table(questions: Sequence[Question]) -> str:
    """Right answers in percent by the likeness of the question to a training question."""
    groups = {
        f"{least:g}" if most == math.inf else f"{least:g} to {most:g}": [
            question for question in questions if least <= question.likeness < most
        ]
        for least, most in BANDS
    }
    groups[f"of these not of {HARD}"] = _far(questions)
    methods = _ranked(questions)
    body = [
        [name, str(len(group)), *(f"{100 * _share(group, method):.1f}" for method in methods)]
        for name, group in groups.items()
        if group
    ]
    return markdown(("like a training question", "questions", *methods), body)


def pairs_table(questions: Sequence[Question]) -> str:
    """For each two methods the questions that one alone answered rightly, and what they differ by."""
    body = []
    for pair in itertools.combinations(_ranked(questions), 2):
        one, other = _alone(questions, *pair)
        all_of_them, far = _difference(questions, *pair), _difference(_far(questions), *pair)
        body.append([", ".join(pair), str(one), str(other), all_of_them, far])
    header = (
        "methods",
        "the first alone is right",
        "the second alone",
        "difference, points",
        f"below {FAR:g}, without {HARD}",
    )
    return markdown(header, body)


def _far(questions: Sequence[Question]) -> list[Question]:
    return [question for question in questions if question.likeness < FAR and question.task != HARD]


def _ranked(questions: Sequence[Question]) -> list[str]:
    return sorted(questions[0].right, key=lambda name: -_share(questions, name))


def _share(questions: Sequence[Question], method: str) -> float:
    return sum(question.right[method] for question in questions) / len(questions)


def _alone(questions: Sequence[Question], first: str, second: str) -> tuple[int, int]:
    """How many questions one of two methods alone answers rightly."""
    one = sum(question.right[first] and not question.right[second] for question in questions)
    other = sum(question.right[second] and not question.right[first] for question in questions)
    return one, other


def _difference(questions: Sequence[Question], first: str, second: str) -> str:
    """In percent of the questions, with its standard error and McNemar's exact p, both paired by question."""
    one, other = _alone(questions, first, second)
    count = len(questions)
    error = math.sqrt(one + other - (one - other) ** 2 / count) / count
    p = stats.binomtest(one, one + other).pvalue if one + other else 1.0
    return f"{100 * (one - other) / count:+.1f} ± {100 * error:.1f} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"


if __name__ == "__main__":
    for comparison in COMPARISONS:
        collect(comparison)
