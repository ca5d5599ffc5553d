"""docs/miniature.md: its tables are what the kept outcomes of the miniature give."""

import math

import pytest

from benchmarks import miniature
from benchmarks.document import fill
from rosa.miniature.make import SEEN_TASK


@pytest.fixture(scope="module")
def comparison():
    return miniature.kept("miniature")[0]


@pytest.fixture(scope="module")
def outcomes():
    return miniature.kept("miniature")[1]


def test_the_document_has_what_the_outcomes_give():
    text = miniature.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, miniature.parts()), "run `python -m benchmarks.miniature`"


@pytest.mark.parametrize("name", miniature.CONFIGS)
def test_every_cell_of_the_configuration_is_there_and_was_made_with_it(name):
    comparison, outcomes = miniature.kept(name)
    (model,) = {outcome["model"] for outcome in outcomes}
    tested = {(o["method"], o["settings"].get("seed")): o["settings"] for o in outcomes}
    for method in comparison.methods:
        for seed in comparison.seeds:
            expected = dict(comparison.cell(model, method, seed, 0.0).settings)
            found = dict(tested[method, seed])
            for settings in (expected, found):
                settings.pop("learning_rate")
                settings.pop("data", None)
            assert found == expected


def test_each_method_was_tested_at_its_best_learning_rate(comparison, outcomes):
    tried = {name: {} for name in comparison.methods}
    for outcome in outcomes:
        if outcome["settings"].get("seed") == comparison.tuning_seed:
            tried[outcome["method"]][outcome["settings"]["learning_rate"]] = outcome.get("validation_loss", math.inf)
    for outcome in outcomes:
        if outcome["settings"].get("seed") in comparison.seeds:
            losses = tried[outcome["method"]]
            assert outcome["learning_rate"] == min(losses, key=losses.get)
            assert losses.keys() == set(comparison.learning_rates)


def test_the_seen_skills_are_no_part_of_the_average(comparison, outcomes):
    base = miniature.outcomes_of(outcomes, "base")[0]["tasks"]
    unseen = [score for name, score in base.items() if name != SEEN_TASK]
    expected = 100 * sum(score["correct"] for score in unseen) / sum(score["total"] for score in unseen)
    assert miniature.summary(comparison, outcomes)[0].micro.mean == pytest.approx(expected)
