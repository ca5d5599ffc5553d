"""The study on real weights: its rows, its kept outcomes, and the page made of them."""

import json

import pytest

from benchmarks.document import fill
from benchmarks.smollm2 import base, report
from benchmarks.smollm2.study import LONG, ROOT, TASKS
from rosa.comparison.cell import OF_THE_MACHINE
from rosa.comparison.fit import check_options

STUDIES = report.read()


def rows(name, count):
    return [{"instruction": f"{name} {i}", "input": "", "output": "true", "answer": "true"} for i in range(count)]


def test_training_rows_are_as_many_of_both_and_tests_are_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "FOLDER", tmp_path / "out")
    files = {"training/math_data.json": [*rows("problem", 20), *rows("SVAMP", 20)]}
    for kind, names in base.TESTS.items():
        for name in names:
            files[f"benchmarks/{name}/test.json"] = rows(name, 30 if name == "AddSub" else 400)
            if kind == "commonsense":
                files[f"benchmarks/{name}/train.json"] = rows(f"{name} train", 30)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    base.make_rows(tmp_path)

    def read(name):
        return json.loads((tmp_path / "out" / name).read_text())

    first = read("commonsense.json")
    assert len(read("arithmetic.json")) == 40 == len(first) == len({row["instruction"] for row in first})
    assert len({row["instruction"].split(" train")[0] for row in first}) == 4  # some of every set
    assert (len(read("tests/gsm8k/test.json")), len(read("tests/boolq/test.json"))) == (200, 300)
    assert len(read("tests/AddSub/test.json")) == 30  # there are no more
    assert {row["instruction"] for row in read("tests/SVAMP/test.json")}.isdisjoint(f"SVAMP {i}" for i in range(20))
    base.make_rows(tmp_path)
    assert read("commonsense.json") == first


@pytest.mark.parametrize("name", STUDIES)
def test_every_option_of_the_study_is_one(name):
    comparison = STUDIES[name].comparison
    for method in comparison.methods:
        check_options(comparison.cell("any model", method, 0))
        if name in TASKS:
            assert len(comparison.rates(method)) >= 4


def test_the_long_runs_take_the_rates_that_the_short_ones_chose():
    chosen, taken = (STUDIES[name].rates for name in ("arithmetic", LONG))
    assert taken == {name: chosen[name] for name in taken}


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_kept_was_made_with_the_configuration(name):
    study = STUDIES[name]
    comparison, (model,) = study.comparison, study.comparison.models
    kept = {path.parent for path in (ROOT / comparison.output / "cells").glob("*/*/*/result.json")}
    for method in comparison.methods:
        cells = [comparison.tuning_cell(model, method, rate) for rate in comparison.rates(method)]
        if method in study.rates:
            cells += [comparison.cell(model, method, seed, study.rates[method]) for seed in comparison.seeds]
        for cell in cells:
            folder = ROOT / cell.folder
            if folder in kept:
                kept.remove(folder)
                found = json.loads((folder / "result.json").read_text())["settings"]
                now = json.loads(json.dumps(dict(cell.settings)))
                assert {**found, **dict.fromkeys(OF_THE_MACHINE)} == {**now, **dict.fromkeys(OF_THE_MACHINE)}
    assert not kept, "results of no cell of the configuration"


def test_the_chosen_rate_is_that_of_the_lowest_loss():
    study = STUDIES["arithmetic"]
    for name, by_rate in study.tried.items():
        lowest = min(by_rate, key=lambda rate: by_rate[rate].get("validation_loss", float("inf")))
        assert study.rates[name] == lowest


def test_a_result_at_a_rate_that_was_surpassed_is_left_out():
    study = STUDIES[LONG]
    (model,) = study.comparison.models
    at_rates = [study.comparison.cell(model, "LoRA", 2333, rate) for rate in (study.rates["LoRA"], 0.5)]
    found, surpassed = map(study._tested, at_rates)
    assert found in study.tested["LoRA"] and surpassed is None


def test_the_documents_have_what_the_outcomes_give():
    for file, made in report.parts(STUDIES).items():
        text = file.read_text(encoding="utf-8")
        assert text == fill(text, made), "run `python -m benchmarks.smollm2.report`"


def test_the_picture_names_every_method_and_shows_its_losses():
    study, long = STUDIES["arithmetic"], STUDIES[LONG]
    short, tested, epochs = report.courses(study, long).axes
    names = [label.get_text() for label in short.get_yticklabels()]
    assert set(names) == set(study.tried)
    for name, line in zip(names, short.lines, strict=True):
        assert line.get_xdata()[-1] == study.short(name)["validation_loss"]
    for panel, shown in ((tested, study), (epochs, long)):
        found = {name for name in shown.comparison.methods if shown.tested.get(name)}
        assert {line.get_label() for line in panel.lines} == found
