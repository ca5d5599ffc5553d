"""The answers to word problems, question by question: how like the training rows a question is, and pairs of methods.

    python -m benchmarks.smollm2.answers

reads the predictions that `rosa compare` left beside its results, which are too large to be kept in the repository, and
keeps them as tables of zeros and ones, beside those of runs whose predictions are no longer there;
`benchmarks.smollm2.report` makes its tables of these alone.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from benchmarks.smollm2.study import LONG, ROOT, Study
from benchmarks.tables import markdown
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
        right (dict): of each method by the seed of its run whether that answered rightly.
    """

    task: str
    likeness: float
    right: dict[str, dict[int, bool]]

    def share(self, method: str) -> float:
        """Of a method's runs that answered rightly."""
        return statistics.fmean(self.right[method].values())


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
    words = re.findall(r"\w+", f"{row['instruction']} {row.get('input') or ''}".lower())
    masked = ["#" if re.fullmatch(r"\d+", word) else word for word in words]
    return set(zip(masked, masked[1:], masked[2:], strict=False)) or {tuple(masked)}


def collect(name: str) -> None:
    """Write the table of answers from the predictions that lie beside a comparison's results; the answers of a run
    without them stay as they are kept.

    Args:
        name (str): of COMPARISONS.

    Raises:
        FileNotFoundError: a run has neither predictions nor answers that are kept.
    """
    study = Study(name)
    comparison, (model,) = study.comparison, study.comparison.models
    runs = [(method, outcome["seed"]) for method in study.rates for outcome in study.tested[method]]
    folders = {
        f"{method}:{seed}": ROOT / comparison.cell(model, method, seed, study.rates[method]).folder / "predictions"
        for method, seed in runs
    }
    kept = _rows(name) if _file(name).exists() else []
    lines = ["task,likeness," + ",".join(folders)]
    for task in comparison.tasks.split(","):
        known = [row for row in kept if row["task"] == task]
        files = {run: folder / f"{task}.jsonl" for run, folder in folders.items()}
        made = {run: _read(file) for run, file in files.items() if file.exists() or not (known and run in known[0])}
        likes = [row["likeness"] for row in known]
        if made:
            training = load_rows(str(ROOT / comparison.train["data"]))
            likes = [f"{like:.3f}" for like in likeness(next(iter(made.values())), training)]
        answers = (
            [str(int(row["correct"])) for row in made[run]] if run in made else [row[run] for row in known]
            for run in files
        )
        lines += [f"{task}," + ",".join(row) for row in zip(likes, *answers, strict=True)]
    replace_text(_file(name), "\n".join(lines) + "\n")


def _file(name: str) -> Path:
    return KEPT / f"answers-{name}.csv"


def _read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def read(name: str) -> list[Question]:
    """The questions and answers that are kept of one of COMPARISONS."""
    return [_question(row) for row in _rows(name)]


def _rows(name: str) -> list[dict[str, str]]:
    with open(_file(name), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _question(row: dict[str, str]) -> Question:
    found = Question(row.pop("task"), float(row.pop("likeness")), {})
    for run, right in row.items():
        method, _, seed = run.rpartition(":")
        found.right.setdefault(method, {})[int(seed)] = right == "1"
    return found


def likeness_table(questions: Sequence[Question]) -> str:
    """Right answers in percent by the likeness of the question to a training question, the mean of a method's runs."""
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
    """For each two methods the questions that one answered rightly in more of its runs than the other, and what they
    differ by."""
    body = []
    for pair in itertools.combinations(_ranked(questions), 2):
        one, other = _better(questions, *pair)
        by_seed = ", ".join(f"{100 * found:+.1f}" for found in _by_seed(questions, *pair))
        all_of_them, far = _difference(questions, *pair), _difference(_far(questions), *pair)
        body.append([", ".join(pair), str(one), str(other), by_seed, all_of_them, far])
    header = (
        "methods",
        "the first is better",
        "the second",
        "points, by seed",
        "difference, points",
        f"below {FAR:g}, without {HARD}",
    )
    return markdown(header, body)


def _far(questions: Sequence[Question]) -> list[Question]:
    return [question for question in questions if question.likeness < FAR and question.task != HARD]


def _ranked(questions: Sequence[Question]) -> list[str]:
    return sorted(questions[0].right, key=lambda name: -_share(questions, name))


def _share(questions: Sequence[Question], method: str) -> float:
    return statistics.fmean(question.share(method) for question in questions)


def _differences(questions: Sequence[Question], first: str, second: str) -> list[float]:
    return [question.share(first) - question.share(second) for question in questions]


def _better(questions: Sequence[Question], first: str, second: str) -> tuple[int, int]:
    """How many questions each of two methods answers rightly in more of its runs than the other."""
    found = _differences(questions, first, second)
    return sum(difference > 0 for difference in found), sum(difference < 0 for difference in found)


def _by_seed(questions: Sequence[Question], first: str, second: str) -> list[float]:
    """By how much the first is ahead with each of the seeds that both have, as a share of the questions."""
    one, other = (questions[0].right[name] for name in (first, second))
    return [
        statistics.fmean(question.right[first][seed] - question.right[second][seed] for question in questions)
        for seed in one
        if seed in other
    ]


def _difference(questions: Sequence[Question], first: str, second: str) -> str:
    """In percent of the questions, with its standard error and the exact p of a sign test, both paired by question.
    With one run each that is McNemar's test."""
    found = _differences(questions, first, second)
    error = statistics.pstdev(found) / math.sqrt(len(found))
    one, other = _better(questions, first, second)
    p = stats.binomtest(one, one + other).pvalue if one + other else 1.0
    chance = "< 0.001" if p < 0.001 else f"= {p:.3f}"
    return f"{100 * statistics.fmean(found):+.1f} ± {100 * error:.1f} (p {chance})"


if __name__ == "__main__":
    for comparison in COMPARISONS:
        collect(comparison)
