"""The miniature: every row's answer found again from its question, no leakage, and folders that are whole or absent."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest

from rosa.data.rows import load_rows
from rosa.data.tokens import tokenize
from rosa.miniature.base import BaseRecipe
from rosa.miniature.make import MiniatureRecipe, make
from rosa.miniature.skills import OPTIONS, SEEN, TRUTHS, UNSEEN, WORDS, draw_rows
from rosa.miniature.training import Schedule

BOTH = {**SEEN, **UNSEEN}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 32}
BASE = BaseRecipe(**SHAPE, schedule=Schedule(steps=2, batch_size=4, learning_rate=1e-3))
RECIPE = MiniatureRecipe(BASE, base_rows=60, train_rows=40, test_rows=10, seen_rows=20)


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def checked(text):
    """The words of a list: known ones, none twice."""
    words = text.split()
    assert words and set(words) <= set(WORDS) and len(set(words)) == len(words)
    return words


def listed(question, mark):
    """The words of the list that follows the mark."""
    return checked(question.partition(mark)[2])


def options(question):
    one, two = re.search(r"Option1: (.*) Option2: (.*)$", question).groups()
    lists = checked(one), checked(two)
    assert len(lists[0]) != len(lists[1]) and not set(lists[0]) & set(lists[1])
    return lists


def option(meant):
    """A solver: the option of which `meant(words, about)` is true; about is the word before the question mark."""

    def solve(question):
        about = re.search(r"(\w+)( words)?\?", question).group(1)
        one, two = (meant(words, about) for words in options(question))
        assert one != two
        return OPTIONS[two]

    return solve


def which_is_longer(question):
    one, two = map(len, options(question))
    return OPTIONS[two > one]


def truth(candidates):
    """A solver: whether the word in question is among the candidates of the list."""

    def solve(question):
        word = question.split()[1]
        assert word in WORDS
        return TRUTHS[word not in candidates(listed(question, "? "))]

    return solve


# Each answer from the question alone.
SOLVERS = {
    "copy": lambda q: listed(q, "words: "),
    "rest": lambda q: listed(q, "without the first: ")[1:],
    "reverse": lambda q: reversed(listed(q, "backwards: ")),
    "backwards_most": lambda q: reversed(listed(q, "backwards, without the last: ")[:-1]),
    "first": lambda q: [listed(q, "first word? ")[0]],
    "last": lambda q: [listed(q, "last word? ")[-1]],
    "first_second": lambda q: listed(q, "first and the second word? ")[:2],
    "count": lambda q: [str(len(listed(q, "there? ")))],
    "is_first": truth(lambda words: words[:1]),
    "is_last": truth(lambda words: words[-1:]),
    "begins": option(lambda words, about: words[0] == about),
    "has_count": option(lambda words, about: len(words) == int(about)),
    "backwards_rest": lambda q: reversed(listed(q, "backwards, without the first: ")[1:]),
    "ends": lambda q: [listed(q, "first and the last word? ")[i] for i in (0, -1)],
    "longer": which_is_longer,
    "contains": truth(lambda words: words),
}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return make(tmp_path_factory.mktemp("miniature"), RECIPE)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_answer_follows_from_its_question(name):
    rows = draw_rows({name: BOTH[name]}, 300, random.Random(0))
    for row in rows:
        choice = isinstance(BOTH[name].form, tuple)
        solved = SOLVERS[name](row["instruction"])
        assert row["answer"] == (solved if choice else f"the answer is {' '.join(solved)}"), row
        assert row["output"] == ("the correct answer is " if choice else "") + row["answer"]
        assert row["input"] == ""
    if isinstance(BOTH[name].form, tuple):
        counts = Counter(row["answer"] for row in rows)
        assert set(counts) == set(BOTH[name].form) and min(counts.values()) > 100  # 150 expected


@pytest.mark.parametrize("name", sorted(set(BOTH) - set(SOLVERS)))
def test_every_step_of_every_worked_problem_is_right(name):
    for row in draw_rows({name: BOTH[name]}, 100, random.Random(0)):
        steps = row["output"].split(". ")
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
            assert int(result) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
        assert row["answer"] == result
        assert set(numbers(row["instruction"])) <= set(numbers(row["output"])), row


def test_the_sums_are_those_of_their_questions():
    for name in ("sum", "difference"):
        for row in draw_rows({name: SEEN[name]}, 100, random.Random(0)):
            one, sign, other, second_sign, last = re.search(r"(\d+) (.) (\d+) (.) (\d+)", row["instruction"]).groups()
            assert {sign, second_sign} == {"+", "-"}
            signed = [int(one), int(f"{sign}{other}"), int(f"{second_sign}{last}")]
            assert int(row["answer"]) == sum(signed)


def test_the_unseen_problem_adds_what_both_have():
    for row in draw_rows({"together_fewer": UNSEEN["together_fewer"]}, 100, random.Random(0)):
        one, fewer = numbers(row["instruction"])
        assert int(row["answer"]) == one + (one - fewer)


def test_no_skill_is_seen_and_unseen_and_no_name_is_given_twice():
    assert set(BOTH) == {*SOLVERS, "one_step", "two_steps", "sum", "difference", "together_fewer"}
    assert not set(SEEN) & set(UNSEEN)


def test_every_form_of_answer_is_seen():
    assert {skill.form for skill in SEEN.values()} == {skill.form for skill in UNSEEN.values()}


def test_no_word_is_named_twice():
    assert len(set(WORDS)) == len(WORDS)


def test_rows_are_distinct_and_the_skills_share_them_equally():
    rows = draw_rows(UNSEEN, 500, random.Random(0))
    assert len({row["instruction"] for row in rows}) == len(rows) == 500
    assert sum("without the first" in row["instruction"] for row in rows) == 500 // len(UNSEEN)


def test_too_many_rows_of_a_skill_are_an_error():
    with pytest.raises(ValueError, match="sum has too few instructions for 5000 rows"):
        draw_rows({"sum": SEEN["sum"]}, 5000, random.Random(0))
    assert len(draw_rows({"sum": SEEN["sum"]}, 5000, random.Random(0), distinct=False)) == 5000


def test_rows_that_are_excluded_are_not_drawn():
    first = draw_rows({"copy": SEEN["copy"]}, 5000, random.Random(0))
    second = draw_rows({"copy": SEEN["copy"]}, 4000, random.Random(0), without=first)
    assert not {row["instruction"] for row in first} & {row["instruction"] for row in second}


def test_the_tasks_describe_themselves(miniature):
    assert miniature.tasks == (*UNSEEN, "seen")
    assert {path.name for path in miniature.data_dir.iterdir() if path.is_dir()} == set(miniature.tasks)
    for name, skill in UNSEEN.items():
        rows = read(miniature.data_dir / name / "test.json")
        assert len(rows) == RECIPE.test_rows
        form = list(skill.form) if isinstance(skill.form, tuple) else skill.form
        assert read(miniature.data_dir / name / "task.json") == {"answer": form}
        assert all(row["answer"] in row["output"] for row in rows)
    assert read(miniature.data_dir / "seen" / "task.json") == {"answer": "text"}
    assert all(row["answer"] == row["output"] for row in read(miniature.data_dir / "seen" / "test.json"))


def test_no_test_row_is_trained_on(miniature, tmp_path, monkeypatch):
    from rosa.miniature import make as module

    trained_on = []
    monkeypatch.setattr(module, "base_model", lambda rows, *_: trained_on.extend(rows))
    data_dir = make(tmp_path, RECIPE).data_dir
    train = read(data_dir / "train.json")
    assert (len(train), len(trained_on)) == (RECIPE.train_rows, RECIPE.base_rows)
    trained_on = {row["instruction"] for row in trained_on}
    assert len({row["instruction"] for row in train}) == len(train)
    for name in miniature.tasks:
        test = {row["instruction"] for row in read(data_dir / name / "test.json")}
        assert len(test) == (RECIPE.seen_rows if name == "seen" else RECIPE.test_rows)
        assert not test & {row["instruction"] for row in train} and not test & trained_on


def test_the_base_takes_the_rows_of_the_data(miniature):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = load_rows(str(miniature.data))
    examples = tokenize(rows, AutoTokenizer.from_pretrained(miniature.model))
    model = AutoModelForCausalLM.from_pretrained(miniature.model)
    assert max(map(len, examples["input_ids"])) < model.config.max_position_embeddings
    assert max(map(max, examples["input_ids"])) < model.config.vocab_size


def test_a_recipe_determines_the_rows(miniature, tmp_path):
    again = make(tmp_path, RECIPE)
    assert (again.data_dir.name, again.model.name) == (miniature.data_dir.name, miniature.model.name)
    assert again.data.read_bytes() == miniature.data.read_bytes()
    assert (again.model / "model.safetensors").read_bytes() == (miniature.model / "model.safetensors").read_bytes()


def test_what_was_made_is_used_again_and_another_recipe_makes_another(tmp_path):
    first = make(tmp_path, RECIPE)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make(tmp_path, RECIPE) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times

    more_rows = make(tmp_path, replace(RECIPE, train_rows=50))
    assert more_rows.model == first.model and more_rows.data_dir != first.data_dir
    other_seed = make(tmp_path, replace(RECIPE, seed=1))
    assert other_seed.model != first.model and other_seed.data_dir != first.data_dir


def test_a_killed_run_leaves_nothing_that_a_later_one_takes_for_whole(tmp_path):
    long = replace(BASE, schedule=replace(BASE.schedule, steps=1_000_000))
    code = (
        "from rosa.miniature.make import *; from pathlib import Path\n"
        f"make(Path({str(tmp_path)!r}), MiniatureRecipe({long!r}, 60, 40, 10, 20))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        while not list(tmp_path.glob("unfinished-*")) or not list(tmp_path.glob("data-*")):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.glob("base-*"))
    made = make(tmp_path, RECIPE)
    assert (made.model / "model.safetensors").is_file() and made.data.is_file()
    assert [path.name for path in tmp_path.glob("base-*")] == [made.model.name]
