"""Printed figures beside measured ones in a comparison's table, and a comparison narrowed on the command line."""

import csv
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from rosa.cli import main
from rosa.comparison.fit import check_options
from rosa.comparison.plan import load_comparison
from rosa.comparison.printed import MICRO, TRAINABLE, Printed, read_printed

from .tiny_qwen2 import save_base

PAPER = Path(__file__).parents[2] / "configs" / "paper"
TABLES = sorted(file.name for file in PAPER.glob("*.yaml") if "seeds" in yaml.safe_load(file.read_text()))
ROWS = [{"instruction": f"Add {i} and {i}.", "output": str(2 * i), "answer": str(2 * i)} for i in range(12)]
METHODS = {"RoSA": {"rank": 4}, "LoRA": {"method": "lora", "peft": {"r": 2}}, "LN tuning": {"method": "ln_tuning"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison's file, its training options in one of their own, a base, data, two tasks, and printed figures."""
    folder = tmp_path_factory.mktemp("comparison")
    save_base(folder / "base", ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for name in ("doubles", "sums"):
        (folder / name).mkdir()
        (folder / name / "task.json").write_text('{"answer": "number"}')
        (folder / name / "test.json").write_text(json.dumps(ROWS))
    (folder / "train.yaml").write_text(yaml.safe_dump({"data": str(folder / "rows.json"), "max_steps": 900}))
    settings = {"output": str(folder / "out"), "models": [str(folder / "base")], "seeds": [1, 2], "train": "train.yaml"}
    settings |= {"tasks": ["doubles", "sums"], "data_dir": str(folder), "methods": METHODS, "printed": "printed.csv"}
    settings["decoding"] = {"max_new_tokens": 2}
    (folder / "table.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "printed.csv").write_text(
        "model,method,trainable,doubles,sums,micro-average\n"
        "base,RoSA,4.000,12.5,,50.00\nbase,Full,100,1,2,3\nother,LoRA,1,2,3,4\n"
    )
    return folder


def narrowed(folder, *words):
    output = folder / f"out-{len(words)}"
    words = ["--only", "LoRA", "RoSA", "--set", "seeds=[2]", "train.max_steps=2", "decoding.limit=3", *words]
    main(["compare", "--config", str(folder / "table.yaml"), *words, f"output={output}"])
    return output


def test_a_narrowed_comparison_runs_that_part_and_has_the_printed_figures_beside(folder, monkeypatch):
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    output = narrowed(folder)
    outcomes = [json.loads(line) for line in (output / "outcomes.jsonl").read_text().splitlines()]
    assert [(o["method"], o["settings"].get("seed")) for o in outcomes] == [("base", None), ("RoSA", 2), ("LoRA", 2)]
    assert all(o["steps"] == 2 for o in outcomes[1:]) and all(o["tasks"]["sums"]["total"] == 3 for o in outcomes)
    _, rosa, lora = csv.DictReader((output / "table-base.csv").open())
    assert rosa["doubles_printed"] == "12.5" and "sums_printed" not in rosa and lora["micro-average_printed"] == ""
    for name, measured in ((TRAINABLE, "trainable"), ("doubles", "doubles"), (MICRO, "micro_average")):
        difference = float(rosa[measured]) - float(rosa[f"{name}_printed"])
        assert float(rosa[f"{name}_minus_printed"]) == pytest.approx(difference)
    lines = {line.split(" | ")[0][2:]: line for line in (output / "table-base.md").read_text().splitlines()}
    cell = f"{float(rosa['micro_average']):.1f} (50.00, {float(rosa['micro_average']) - 50:+.1f})"
    assert cell in lines["RoSA"] and f"{float(rosa['trainable']):.3f} (4.000, " in lines["RoSA"]
    assert "(" not in lines["LoRA"] and "(" not in lines["base"]
    assert cell in (output / "table-base.tex").read_text()
    assert "In brackets: the printed figure" in (output / "table-base.md").read_text()


def test_a_micro_average_over_other_tasks_is_not_set_beside_the_printed_one():
    printed = Printed(("a", "b"), {("m", "RoSA"): {"a": Decimal("1.0"), MICRO: Decimal("2.0")}})
    assert printed.of("folder/m", "RoSA", ["b", "a"]) == {"a": 1, MICRO: 2}
    assert printed.of("m", "RoSA", ["a"]) == {"a": 1}
    assert printed.of("n", "RoSA", ["a", "b"]) == printed.of("m", "LoRA", ["a", "b"]) == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the first line must name each column once, model and method first"),
        ("model,boolq\nm,1\n", "the first line must name each column once, model and method first"),
        ("model,method,boolq,boolq\n", "the first line must name each column once"),
        ("model,method,bolq\nm,RoSA,1\n", "unknown key bolq; did you mean boolq?"),
        ("model,method,boolq\nm,RoSA,1\nm,RoSA,2\n", "line 3: RoSA of m is there twice"),
        ("model,method,boolq\nm,RoSA, k_ratio 1,1\n", "line 2: 4 values for 3 columns"),
        ("model,method,boolq\nm,RoSA,high\n", "line 2, boolq: a figure must be a number from 0 to 100, got 'high'"),
        ("model,method,boolq\nm,RoSA,nan\n", "got 'nan'"),
        ("model,method,boolq\nm,RoSA,100.1\n", "got '100.1'"),
    ],
)
def test_faults_of_a_printed_table_are_told(tmp_path, text, message):
    (tmp_path / "printed.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_printed(tmp_path / "printed.csv")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "printed=nowhere.csv"], "there is no file of printed figures"),
        (["--set", "printed=[1]"], "printed must be the name of a file, got [1]"),
        (["--set", "seeds"], "--set takes KEY=VALUE, got 'seeds'"),
        (["--set", "seeds=[1"], "--set seeds=[1: the value is not valid YAML"),
        (["--set", "sedes=[1]"], "unknown key sedes; did you mean seeds?"),
        (["--set", "train.max_step=3"], "train: unknown key max_step; did you mean max_steps?"),
        (["--set", "seeds.first=3"], "seeds must hold keys and values"),
        (["--set", "train=nowhere.yaml"], "there is no configuration file"),
        (["--only", "LoRa"], "--only: unknown key LoRa; did you mean LoRA?"),
    ],
)
def test_faults_on_the_command_line_are_told_before_any_training(folder, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(folder / "table.yaml"), *words])
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("file", TABLES)
def test_each_row_of_the_papers_tables_has_its_cell_and_its_figures(file):
    comparison = load_comparison(PAPER / file, {"train.use_cpu": True})
    models = [Path(model).name for model in comparison.models]
    rows = {(model, method) for model in models for method in comparison.methods}
    assert rows == comparison.printed.figures.keys()
    assert all(MICRO in figures for figures in comparison.printed.figures.values())
    for method in comparison.methods:
        check_options(comparison.cell(comparison.models[0], method, 2333))


def test_the_two_readings_of_the_methods_differ_in_two():
    read = [
        load_comparison(PAPER / "table1_commonsense.yaml", changes).methods
        for changes in ({}, {"methods": "methods_as_written.yaml"})
    ]
    assert read[0].keys() == read[1].keys()
    assert [name for name in read[0] if read[0][name] != read[1][name]] == ["AdaLoRA", "LN tuning"]
    assert load_comparison(PAPER / "table2_model_sizes.yaml").methods["AdaLoRA"] == read[0]["AdaLoRA"]
