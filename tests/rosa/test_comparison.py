"""`rosa compare`: its settings, its cells on a tiny real model, death and resumption, its statistics and tables."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from scipy import stats
from transformers import AutoModelForCausalLM

import rosa
from rosa.adapters.pretrained import load_model
from rosa.cli import main
from rosa.comparison.cell import _goes_on, read_result, run_cell
from rosa.comparison.fit import check_fit, check_options
from rosa.comparison.inputs import read_inputs
from rosa.comparison.overlap import seen, told
from rosa.comparison.plan import Comparison, load_comparison
from rosa.comparison.report import k_ratio_points, read_outcomes
from rosa.comparison.run import best_rates
from rosa.comparison.statistics import best_baseline, micro_by_seed, spread, summarise
from rosa.comparison.tables import csv_table, latex, markdown
from rosa.miniature.make import MiniatureRecipe
from rosa.training.finetune import finetune
from rosa.training.parsing import parse

from .tiny_qwen2 import save_base

ROOT = Path(__file__).parents[2]
ROWS = [
    {"instruction": f"Add {i} and {i}.", "output": f"The answer is {2 * i}", "answer": str(2 * i)} for i in range(24)
]
SETTINGS = {
    "seeds": [1, 2],
    "tasks": "doubles",
    "side_tasks": "words",
    "methods": {"RoSA": {"rank": 4}, "LoRA": {"method": "lora", "peft": {"r": 2}}},
    "train": {"max_steps": 4, "val_size": 4, "eval_strategy": "no", "save_steps": 2, "learning_rate": "1e-2"},
    "decoding": {"batch_size": 4, "max_new_tokens": 4, "limit": 4},
}

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, training data and the folders of two tasks."""
    folder = tmp_path_factory.mktemp("files")
    save_base(folder / "base", ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for name, form in (("doubles", "number"), ("words", ["the", "a"])):
        (folder / name).mkdir()
        rows = ROWS if form == "number" else [{**row, "answer": "the"} for row in ROWS]
        (folder / name / "test.json").write_text(json.dumps(rows))
        (folder / name / "task.json").write_text(json.dumps({"answer": form}))
    return folder


def write(path, files, **changes):
    settings = SETTINGS | {"output": str(path / "out"), "models": [str(files / "base")], "data_dir": str(files)}
    settings["train"] = {**settings["train"], "data": str(files / "rows.json")}
    settings |= changes
    config = path / "comparison.yaml"
    config.write_text(
        yaml.safe_dump({key: value for key, value in settings.items() if value is not None}, sort_keys=False)
    )
    return config


def results(path):
    return {file.parent.relative_to(path).as_posix(): file.stat().st_mtime_ns for file in path.rglob("result.json")}


@pytest.fixture(scope="module")
def grid(files):
    """The settings of a comparison in which RoSA has a grid of its own, and rows show what was forgotten."""
    methods = {**SETTINGS["methods"], "RoSA": {"rank": 4, "learning_rates": ["1e-3", 0.02]}}
    forgetting = {"data": str(files / "rows.json"), "rows": 3}
    rates = {"learning_rates": [0.001, 0.05], "tuning_seed": 7, "tuning_steps": 3}
    return {"methods": methods, "forgetting": forgetting, **rates}


@pytest.fixture(scope="module")
def finished(files, grid, tmp_path_factory):
    """A comparison that has run, with grids of learning rates; its folder."""
    path = tmp_path_factory.mktemp("comparison")
    main(["compare", "--config", str(write(path, files, **grid)), "--jobs", "2"])
    return path


def test_every_cell_is_trained_and_tested_and_the_grid_before_them(finished):
    cells = results(finished / "out" / "cells" / "base")
    tuning = {"RoSA/tuning-0.001", "RoSA/tuning-0.02", "LoRA/tuning-0.001", "LoRA/tuning-0.05"}
    assert cells.keys() == {"base"} | tuning | {
        f"{method}/seed-{seed}" for method in ("RoSA", "LoRA") for seed in (1, 2)
    }
    outcomes = read_outcomes(finished / "out" / "outcomes.jsonl")
    base, *tested = [outcome for outcome in outcomes if "tasks" in outcome]
    assert (base["method"], base["trainable"]) == ("base", 0)
    assert [(o["method"], o["seed"]) for o in tested] == [("RoSA", 1), ("LoRA", 1), ("RoSA", 2), ("LoRA", 2)]
    for outcome in tested:
        assert outcome["steps"] == 4
        assert outcome["tasks"].keys() == {"doubles", "words"}
        assert outcome["tasks"]["doubles"]["total"] == 4
        assert 0 < outcome["trainable"] < outcome["total"]
        assert {entry["step"] for entry in outcome["course"]} == {4}
        assert outcome["forgetting_loss"] > 0 and outcome["forgetting_loss"] != base["forgetting_loss"]


def test_a_quantized_base_is_trained_on_and_tested_and_told_apart(files, tmp_path, monkeypatch):
    train = {**SETTINGS["train"], "max_steps": 2, "data": str(files / "rows.json")}
    with_4_bits, plain = (
        load_comparison(write(tmp_path, files, side_tasks=None, train=train | more))
        for more in ({"load_in": "4bit"}, {})
    )
    model = str(files / "base")
    cells = [with_4_bits.base_cell(model), with_4_bits.cell(model, "RoSA", 1)]
    inputs, loaded = read_inputs(with_4_bits, cells), []

    def load(name, **options):
        loaded.append(load_model(name, **options))
        return loaded[-1]

    monkeypatch.setattr(rosa.comparison.cell, "load_model", load)
    for cell in cells:
        run_cell(cell, inputs)
    assert [model.is_loaded_in_4bit for model in loaded] == [True, True]
    for cell in (plain.base_cell(model), plain.cell(model, "RoSA", 1)):
        with pytest.raises(ValueError, match=r"made with other settings \(load_in\)"):
            read_result(cell, inputs)


def test_what_was_forgotten_is_measured_again_on_other_rows(finished, files, grid):
    """Without answering or training again."""
    before = results(finished)
    trained = (finished / "out" / "cells" / "base" / "RoSA" / "seed-1" / "training.json").stat().st_mtime_ns
    losses = []
    for rows in (4, 3):
        changed = grid | {"forgetting": {**grid["forgetting"], "rows": rows}}
        main(["compare", "--config", str(write(finished, files, **changed))])
        outcomes = read_outcomes(finished / "out" / "outcomes.jsonl")
        losses.append([outcome["forgetting_loss"] for outcome in outcomes if "tasks" in outcome])
    assert all(four != three for four, three in zip(*losses, strict=True))
    assert results(finished).keys() == before.keys()
    assert (finished / "out" / "cells" / "base" / "RoSA" / "seed-1" / "training.json").stat().st_mtime_ns == trained


def test_each_method_takes_the_learning_rate_with_the_lower_validation_loss(finished):
    cells = finished / "out" / "cells" / "base"
    for method, rates in (("RoSA", (0.001, 0.02)), ("LoRA", (0.001, 0.05))):
        found = {rate: json.loads((cells / method / f"tuning-{rate}" / "result.json").read_text()) for rate in rates}
        assert all(o["seed"] == 7 and o["steps"] == 3 and "tasks" not in o for o in found.values())
        best = min(found, key=lambda rate: found[rate]["validation_loss"])
        assert json.loads((cells / method / "seed-1" / "result.json").read_text())["learning_rate"] == best


def test_the_table_is_written_in_three_forms(finished):
    out = finished / "out"
    text = (out / "table-base.md").read_text()
    losses = "held-out loss | loss on other rows"
    assert text.startswith(f"| method | lr | trainable % | doubles | words | micro-average | {losses} | to the best")
    assert "tokens/s" not in text  # of a GPU alone
    # The tests are the training rows, of which four are asked.
    assert "Among the training rows, word for word, are these shares of the questions: doubles 100 %, words 100" in text
    rows = list(csv.DictReader((out / "table-base.csv").open()))
    assert [row["method"] for row in rows] == ["base", "RoSA", "LoRA"]
    assert rows[1]["finished"] == "2" and rows[2]["p_value"] == ""
    assert float(rows[1]["validation_loss"]) > 0 < float(rows[0]["forgetting_loss"]) and not rows[0]["validation_loss"]
    assert r"\toprule" in (out / "table-base.tex").read_text()


def test_finished_cells_are_not_repeated_and_new_seeds_are_added(finished, files, grid):
    before = results(finished)
    config = write(finished, files, **grid, seeds=[1, 2, 3])
    main(["compare", "--config", str(config)])
    after = results(finished)
    assert len(after) == len(before) + 2
    assert all(after[name] == changed for name, changed in before.items())


def test_finished_cells_stay_with_another_attention(finished, files, grid):
    train = {**SETTINGS["train"], "data": str(files / "rows.json"), "attn_implementation": "eager"}
    before = results(finished)
    main(["compare", "--config", str(write(finished, files, **grid, train=train))])
    assert results(finished) == before


def test_other_settings_than_those_of_finished_cells_are_refused(finished, files, grid, capsys):
    train = {**SETTINGS["train"], "data": str(files / "rows.json"), "max_steps": 5}
    config = write(finished, files, **grid, train=train)
    before = results(finished)
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(config)])
    assert "was made with other settings (max_steps)" in capsys.readouterr().err
    assert results(finished) == before


@pytest.fixture(scope="module")
def tested_on_two_rows(files, tmp_path_factory):
    """A comparison of one method that has run, on inputs of its own; its folder."""
    path = tmp_path_factory.mktemp("inputs")
    shutil.copytree(files, path, dirs_exist_ok=True)
    main(["compare", "--config", str(one_method(path))])
    return path


def one_method(path, *, limit=2, tasks="doubles", max_new_tokens=4):
    methods = {"LN tuning": {"method": "ln_tuning"}}
    train = {"max_steps": 1, "data": str(path / "rows.json"), "learning_rate": 0.01, "save_strategy": "no"}
    decoding = {"batch_size": 4, "max_new_tokens": max_new_tokens, "limit": limit}
    options = dict(methods=methods, seeds=[1], train=train, tasks=tasks, side_tasks=None, decoding=decoding)
    return write(path, path, **options)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, change, options, named",
    [
        ("rows.json", lambda rows: rows[5].update(output="The answer is 11"), {}, "data"),
        ("base/generation_config.json", lambda config: config.update(max_length=9), {}, "base"),
        ("doubles/test.json", lambda rows: rows[1].update(instruction="Add 1 and 2."), {}, "the rows of doubles"),
        (None, None, {"max_new_tokens": 5}, "max_new_tokens"),
    ],
)
def test_results_of_other_contents_are_refused_by_name(tested_on_two_rows, file, change, options, named, capsys):
    before = results(tested_on_two_rows)
    kept = None if file is None else (tested_on_two_rows / file).read_bytes()
    if file is not None:
        edit(tested_on_two_rows / file, change)
    try:
        with pytest.raises(SystemExit):
            main(["compare", "--config", str(one_method(tested_on_two_rows, **options))])
    finally:
        if file is not None:
            (tested_on_two_rows / file).write_bytes(kept)
    assert f"was made with other settings ({named})" in capsys.readouterr().err
    assert results(tested_on_two_rows) == before


def test_more_rows_more_tasks_and_other_truths_are_tested_without_training_again(tested_on_two_rows):
    path = tested_on_two_rows
    adapter = path / "out" / "cells" / "base" / "LN-tuning" / "seed-1" / "adapter_model.safetensors"
    trained = adapter.stat().st_mtime_ns
    edit(path / "doubles" / "test.json", lambda rows: rows[0].update(answer="-7"))
    more = ["compare", "--config", str(one_method(path, limit=4, tasks=["doubles", "words"]))]
    main([*more, "--set", "train.attn_implementation=eager"])  # with another attention, too
    assert adapter.stat().st_mtime_ns == trained
    for outcome in read_outcomes(path / "out" / "outcomes.jsonl"):
        assert {name: found["total"] for name, found in outcome["tasks"].items()} == {"doubles": 4, "words": 4}
    main(["compare", "--config", str(one_method(path, limit=4, tasks="words"))])  # fewer tasks: those alone
    assert all(outcome["tasks"].keys() == {"words"} for outcome in read_outcomes(path / "out" / "outcomes.jsonl"))


def test_other_rules_of_reading_answers_have_a_cell_tested_again(tested_on_two_rows):
    comparison = load_comparison(one_method(tested_on_two_rows))
    cell = comparison.base_cell(comparison.models[0])
    inputs = read_inputs(comparison, [cell])
    kept = (cell.folder / "result.json").read_bytes()
    edit(cell.folder / "result.json", lambda result: result["tested_with"].update(inputs.of_tests()))
    assert read_result(cell, inputs) is not None
    edit(cell.folder / "result.json", lambda result: result["tested_with"].update(rules="of an older version"))
    assert read_result(cell, inputs) is None
    (cell.folder / "result.json").write_bytes(kept)


def test_a_cell_goes_on_only_from_what_it_would_begin_with(files, tmp_path):
    train = {**SETTINGS["train"], "data": str(files / "rows.json"), "max_steps": 2}
    comparison = load_comparison(write(tmp_path, files, train=train))
    cell = comparison.cell(comparison.models[0], "LoRA", 1)
    assert not _goes_on(cell)
    finetune(*parse(cell.arguments))
    assert _goes_on(cell)
    assert not _goes_on(replace(cell, settings={**cell.settings, "max_steps": 4}))  # another schedule
    assert not _goes_on(replace(cell, settings={**cell.settings, "learning_rate": 0.5}))


def test_a_result_that_does_not_say_what_it_was_made_with_is_refused(files, tmp_path, capsys):
    folder = tmp_path / "out" / "cells" / "base" / "base"
    folder.mkdir(parents=True)
    for text in ("{", "5", "null", '{"settings": {}}', "[" * 100_000):
        (folder / "result.json").write_text(text)
        with pytest.raises(SystemExit):
            main(["compare", "--config", str(write(tmp_path, files))])
        assert "base/result.json does not say what it was made with" in capsys.readouterr().err


def start(config):
    """`rosa compare` in a process, once a worker of it has begun a cell; the process and its descendants."""
    command = [sys.executable, "-m", "rosa", "compare", "--config", str(config)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have background jobs ignore it
    )  # fmt: skip
    wait_for(lambda: list(config.parent.rglob("log.txt")) or process.poll() is not None)
    assert process.poll() is None, process.stderr.read().decode()
    return process, psutil.Process(process.pid).children(recursive=True)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_comparison_and_until_then_the_folder_is_its_own(files, tmp_path, capfd, sent):
    train = {**SETTINGS["train"], "data": str(files / "rows.json"), "max_steps": 1_000_000}
    config = write(tmp_path, files, train=train)
    process, descendants = start(config)
    try:
        assert descendants
        with pytest.raises(SystemExit):
            main(["compare", "--config", str(config)])
        assert f"another process is at work in {tmp_path / 'out'}: wait" in capfd.readouterr().err
        if sent == signal.SIGINT:  # as the terminal does, to all of them
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        error = process.communicate(timeout=60)[1].decode()
        wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in descendants))
    finally:
        process.kill()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in error
        assert error.splitlines()[-1].startswith("rosa compare: interrupted: finished cells stay")


def test_a_killed_comparison_goes_on_where_it_was(files, tmp_path):
    config = write(tmp_path, files)
    process, _ = start(config)
    wait_for(lambda: results(tmp_path))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = results(tmp_path)
    assert 1 <= len(before) < 5
    main(["compare", "--config", str(config)])
    after = results(tmp_path)
    assert len(after) == 5
    assert all(after[name] == changed for name, changed in before.items())


def test_a_cell_that_died_does_again_only_what_is_not_written_down(files, tmp_path):
    train = {**SETTINGS["train"], "data": str(files / "rows.json"), "save_strategy": "no"}
    methods = {"LoRA": SETTINGS["methods"]["LoRA"], "LN tuning": {"method": "ln_tuning"}}
    config = write(tmp_path, files, seeds=[1], methods=methods, train=train)
    main(["compare", "--config", str(config)])
    untested, untrained = (tmp_path / "out" / "cells" / "base" / name / "seed-1" for name in ("LoRA", "LN-tuning"))

    def state():
        files = [folder / "adapter_model.safetensors" for folder in (untested, untrained)]
        return [json.loads((untested / "result.json").read_text()), *(file.stat().st_mtime_ns for file in files)]

    def answers(folder):
        return [json.loads(line) for line in (folder / "predictions" / "doubles.jsonl").read_text().splitlines()]

    before = state()
    for file in (untested / "result.json", untrained / "result.json", untrained / "training.json"):
        file.unlink()
    for folder in (untested, untrained):
        earlier = [answer | {"prediction": "earlier"} for answer in answers(folder)]
        (folder / "predictions" / "doubles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in earlier))
    main(["compare", "--config", str(config)])
    after = state()
    assert after[:2] == before[:2] and after[2] > before[2]
    assert {answer["prediction"] for answer in answers(untested)} == {"earlier"}
    assert "earlier" not in {answer["prediction"] for answer in answers(untrained)}  # of an adapter that is no more
    assert json.loads((untrained / "result.json").read_text())["steps"] == 4


def test_a_cell_that_fails_leaves_the_finished_ones_and_names_itself(files, tmp_path, capsys):
    config = write(tmp_path, files, seeds=[1])
    blocked = tmp_path / "out" / "cells" / "base" / "LoRA" / "seed-1" / "predictions"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder is to be")
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(config)])
    error = capsys.readouterr().err
    assert "LoRA, seed-1: " in error and "log.txt" in error
    assert results(tmp_path / "out" / "cells" / "base").keys() == {"base", "RoSA/seed-1"}


def test_a_loss_that_is_not_finite_is_an_outcome(files, tmp_path):
    methods = {"LoRA": {"method": "lora", "learning_rate": 1e38}, "LN tuning": {"method": "ln_tuning"}}
    main(["compare", "--config", str(write(tmp_path, files, methods=methods, seeds=[1]))])
    outcomes = read_outcomes(tmp_path / "out" / "outcomes.jsonl")
    diverged = next(outcome for outcome in outcomes if outcome["method"] == "LoRA")
    assert "parameters are no longer finite after step 2" in diverged["diverged"] and "tasks" not in diverged
    rows = list(csv.DictReader((tmp_path / "out" / "table-base.csv").open()))
    assert [row["method"] for row in rows] == ["base", "LN tuning"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sedes": [1]}, "unknown key sedes; did you mean seeds?"),
        ({"train": {"learning_rat": 1}}, "unknown key learning_rat; did you mean learning_rate?"),
        ({"methods": {"LoRA": {"methods": "lora"}}}, "unknown key methods; did you mean method?"),
        ({"methods": {"LoRA": {"method": "loora"}}}, "invalid choice: 'loora'"),
        ({"methods": {"LoRA": {"method": "lora", "peft": {"rank": 3}}}}, "settings of lora: unknown key rank"),
        ({"methods": {"C3A": {"method": "c3a"}}}, "method C3A: c3a does not fit Qwen2ForCausalLM"),
        ({"methods": {"RoSA": {"r_low": 2.0}}}, r"method RoSA: r_low must lie in \(0, 1\], got 2.0"),
        ({"methods": {}}, "methods: name at least one"),
        ({"methods": {"a b": {}, "a-b": {}}}, "methods must differ in their names' letters"),
        ({"seeds": [1, 1]}, "seeds must be different whole numbers"),
        ({"seeds": [2**40]}, "seeds must lie in 0 to"),
        ({"seeds": None}, "must give seeds"),
        ({"seeds": 1}, "seeds must be a list, got 1"),
        ({"learning_rates": [0.1], "tuning_seed": 1}, "tuning_seed 1 is one of the seeds"),
        ({"learning_rates": [-1]}, "learning_rates must be above 0"),
        ({"methods": {"R": {"learning_rates": [0.1, 0]}}}, r"learning_rates must be above 0, got \[0.1, 0.0\]"),
        ({"methods": {"R": {"learning_rates": 0.1}}}, "methods: R: learning_rates must be a list, got 0.1"),
        ({"methods": {"R": {"learning_rates": [0.1]}, "L": {"method": "lora"}}}, "all methods choose theirs, or none"),
        ({"tuning_steps": 0}, "tuning_steps must be a whole number from 1, got 0"),
        ({"forgetting": {"data": "d", "rows": 0}}, "forgetting: rows must be a whole number from 1, got 0"),
        ({"forgetting": {"rows": 5}}, "forgetting must give data"),
        ({"tasks": "doubels"}, "there is no task 'doubels': did you mean doubles?"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"models": ["nowhere/at-all"]}, "no tokenizer can be loaded from nowhere/at-all"),
        (
            {"tasks": ["doubles", 5]},
            r"tasks must be names with commas between, or a list of them, got \['doubles', 5\]",
        ),
        ({"models": None}, "name at least one of the models"),
        ({"miniature": {}}, "the miniature makes its own model"),
        ({"train": {"max_steps": 1}}, "method RoSA: the following arguments are required: --data"),
        ({"methods": {"L": {"method": "lora", "rank": 4}}}, "methods: L: nothing reads rank in a run of this method"),
        ({"methods": {"R": {"dls": False, "dls_mode": "mask"}}}, "methods: R: nothing reads dls_mode in a run"),
        ({"decoding": {"batch_size": 0}}, "batch_size must be a whole number from 1, got 0"),
        ({"decoding": {"batch": 4}}, "decoding: unknown key batch; did you mean batch_size?"),
    ],
)
def test_faults_are_told_before_any_training(files, tmp_path, capsys, changes, message):
    config = write(tmp_path, files, **changes)
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(config)])
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured
    assert not results(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "learning_rates=[-1]", "--set", "seeds=[1]"], "learning_rates must be above 0"),
        (["--only", "C3A", "--only", "RoSA"], "--only: unknown key C3A; known are LoRA, RoSA"),
    ],
)
def test_an_option_given_twice_loses_nothing(files, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(write(tmp_path, files)), *options])
    assert message in capsys.readouterr().err


def test_what_train_says_to_other_methods_stays_out_of_a_cells_command_line(files, tmp_path):
    train = {"data": "d", "rank": 8, "dls_interval": 10, "max_steps": 2}
    methods = {"RoSA": {}, "RoAE": {"dls": False}, "LoRA": {"method": "lora"}, "LD": {"method": "lora", "dls": True}}
    comparison = load_comparison(write(tmp_path, files, train=train, methods=methods))
    options = {name: set(comparison.cell("m", name, 1).arguments) & {"--rank", "--dls_interval"} for name in methods}
    assert options == {
        "RoSA": {"--rank", "--dls_interval"},
        "RoAE": {"--rank"},
        "LoRA": set(),
        "LD": {"--dls_interval"},
    }
    assert comparison.cell("m", "LoRA", 1).settings["rank"] == 8  # by which a finished cell knows what it was made with


def test_a_wrong_option_is_told_before_the_miniature_is_made(tmp_path, capsys):
    settings = {"output": str(tmp_path / "out"), "seeds": [1], "miniature": {}, "methods": {"RoSA": {"rank": "many"}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(tmp_path / "c.yaml")])
    assert "method RoSA: argument --rank: invalid int value: 'many'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_file_and_no_yaml(tmp_path, capsys):
    for text, message in (
        (None, "there is no configuration file"),
        ("a: [", "is not valid YAML"),
        ("- a", "must hold keys"),
    ):
        if text is not None:
            (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(SystemExit):
            main(["compare", "--config", str(tmp_path / "c.yaml")])
        assert message in capsys.readouterr().err


def test_road_has_its_cell_and_its_row_and_is_no_baseline(files, tmp_path):
    methods = {"RoAd_1": {"method": "road", "variant": 1, "targets": ["q_proj", "v_proj"]}}
    config = write(tmp_path, files, methods=methods, seeds=[1], side_tasks=None)
    comparison = load_comparison(config)
    assert not comparison.is_baseline("RoAd_1")
    model = AutoModelForCausalLM.from_pretrained(files / "base")
    trained, total, _ = rosa.count_parameters(rosa.patch(model, rosa.RoadConfig(1, ("q_proj", "v_proj"))))
    cell = comparison.cell(comparison.models[0], "RoAd_1", 1)
    assert check_fit(cell) == (trained, total)
    main(["compare", "--config", str(config)])
    _, outcome = read_outcomes(tmp_path / "out" / "outcomes.jsonl")
    assert (outcome["method"], outcome["trainable"], outcome["total"]) == ("RoAd_1", trained, total)
    assert "| RoAd_1 | 0.01 |" in (tmp_path / "out" / "table-base.md").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "road", "rank": 4}, "methods: RoAd: nothing reads rank in a run of this method"),
        ({"method": "lora", "variant": 1}, "methods: RoAd: nothing reads variant in a run of this method"),
        ({"method": "road", "pairing": "heads"}, "method RoAd: pairing must be 'neighbours'"),
        ({"method": "road", "targets": ["qq"]}, "method RoAd: targets names 'qq', which there is none of"),
    ],
)
def test_wrong_options_of_road_are_told_before_any_training(files, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(write(tmp_path, files, methods={"RoAd": options}))])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("result.json"))


def test_the_comparison_of_roads_variants_is_whole():
    comparison = load_comparison(ROOT / "configs" / "road.yaml")
    for method in comparison.methods:
        cell = comparison.cell(comparison.models[0], method, comparison.seeds[0])
        check_options(cell)
        rate = 3e-3 if method.startswith("RoAd") else 1e-3
        assert parse(cell.arguments)[1].learning_rate == rate


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "configs" / "paper").glob("*.yaml")))
def test_the_papers_configurations_are_whole(file):
    text = yaml.safe_load((ROOT / "configs" / "paper" / file).read_text())
    if "seeds" in text:
        comparison = load_comparison(ROOT / "configs" / "paper" / file)
        assert comparison.seeds == (2333, 1000, 2000, 3000, 4000)
        assert comparison.train["learning_rate"] == 0.001 and comparison.train["val_size"] == 300


def outcome(method, seed, correct, **more):
    tasks = {
        "a": {"correct": correct, "total": 10},
        "b": {"correct": 3, "total": 30},
        "side": {"correct": 0, "total": 5},
    }
    about = {
        "model": "m",
        "method": method,
        "settings": {"seed": seed},
        "learning_rate": 0.1,
        "trainable": 1,
        "total": 50,
    }
    return about | {"tokens_per_second": 1.0, "peak_bytes": None, "tasks": tasks} | more


@pytest.fixture
def outcomes():
    scores = {"RoSA": (7, 9, 8), "LoRA": (6, 7, 7), "VeRA": (2, 3, 2)}
    return [outcome(method, seed, n) for method, by_seed in scores.items() for seed, n in enumerate(by_seed)]


@pytest.fixture
def comparison(tmp_path):
    for name in ("a", "b", "side"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.json").write_text('{"answer": "number"}')
    methods = {"RoSA": {}, "LoRA": {"method": "lora"}, "VeRA": {"method": "vera"}}
    return Comparison(
        tmp_path, methods, (0, 1, 2), {}, models=("m",), tasks="a,b", side_tasks="side", data_dir=tmp_path
    )


def test_the_micro_average_is_over_rows_and_leaves_side_tasks_out(outcomes):
    assert micro_by_seed(outcomes[:1], ["a", "b"]) == {0: 100 * (7 + 3) / 40}


def test_differences_and_p_are_paired_by_seed_with_the_best_baseline(comparison, outcomes):
    rosa, lora, vera = summarise(comparison, "m", outcomes, ["a", "b"])
    assert (rosa.method, lora.method, vera.method) == ("RoSA", "LoRA", "VeRA")
    ours, theirs = ([100 * (n + 3) / 40 for n in scores] for scores in ((7, 9, 8), (6, 7, 7)))
    assert rosa.difference.mean == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    assert rosa.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert lora.p_value is None and vera.difference is None
    again = [{**outcome, "method": "RoSA"} for outcome in outcomes if outcome["method"] == "LoRA"]
    alike = summarise(comparison, "m", [o for o in outcomes if o["method"] != "RoSA"] + again, ["a", "b"])[0]
    assert alike.difference.mean == 0 and alike.p_value is None
    assert best_baseline({"x": {1: 2.0}, "y": {1: 3.0}, "z": {}}) == "y"


@pytest.mark.parametrize(
    ("train", "shares"),
    [
        ({}, [0.25, 0.5, 1.0]),
        ({"dls_k_ratio": 0.75}, [0.25, 0.75, 1.0]),
        ({"dls": False}, [1.0]),
        ({"method": "lora"}, []),
    ],
)
def test_the_share_of_layers_may_be_a_methods_or_said_for_all(comparison, outcomes, train, shares):
    methods = {"RoSA": {}, "RoAE only": {"dls": False}, "a quarter": {"dls_k_ratio": 0.25}, "wide": {"r_low": 0.5}}
    several = replace(comparison, methods=methods, train=train)
    rows = [summarise(comparison, "m", outcomes, ["a", "b"])[0]._replace(method=name) for name in ("base", *methods)]
    assert [share for share, *_ in k_ratio_points(several, rows)] == shares


def test_what_the_training_options_say_of_a_method_tells_a_baseline(comparison):
    assert comparison.is_baseline("LoRA") and not comparison.is_baseline("RoSA")
    assert not replace(comparison, train={"dls": True}).is_baseline("LoRA")
    assert replace(comparison, train={"method": "lora"}).is_baseline("RoSA")


def test_questions_among_the_training_rows_are_found_and_told():
    asked = [{"instruction": text, "input": more} for text, more in (("What  is 2 + 2?", ""), ("A", "b"), ("A", "c"))]
    training = [{"instruction": "what is 2 + 2"}, {"instruction": "a", "input": "B."}]
    assert seen(asked, training) == [True, True, False]
    sums = [{"instruction": f"What is {text}?"} for text in ("17 + 25", "17 - 25", "1.7+25", "1 7+25", "well-known")]
    assert seen(sums, [{"instruction": "what is 17+25"}]) == [True, False, False, False, False]
    assert seen(sums, [{"instruction": "What is well known?"}])[-1]
    assert "these shares of the questions: sums 12 %. Those" in told({"sums": 12.5, "none": 0.0})
    assert told({"none": 0.0}) == ""


def test_spread_is_students(outcomes):
    values = [1.0, 2.0, 4.0]
    found = spread(values)
    low, high = stats.t.interval(0.95, 2, loc=found.mean, scale=stats.sem(values))
    assert found.mean + found.half_width == pytest.approx(high)
    assert found.mean - found.half_width == pytest.approx(low)


def test_diverged_seeds_are_counted_and_not_averaged(comparison, outcomes):
    broken = {**outcome("RoSA", 3, 0), "diverged": "the loss is nan"}
    del broken["tasks"]
    comparison = replace(comparison, seeds=(0, 1, 2, 3))
    row = summarise(comparison, "m", [*outcomes, broken, outcome("LoRA", 3, 10)], ["a", "b"])[0]
    assert (row.finished, row.diverged) == (3, 1)
    assert row.difference.mean == pytest.approx(100 * (1 + 2 + 1) / 40 / 3)  # of the seeds that both have
    assert "RoSA (1 diverged)" in markdown([row])


def test_a_gpus_speed_and_memory_have_columns(comparison, outcomes):
    for found in outcomes:
        found["peak_bytes"], found["tokens_per_second"] = 5 * 10**9, 1234.0
    # A process that found nothing left to train knows neither.
    outcomes[0]["peak_bytes"] = outcomes[0]["tokens_per_second"] = outcomes[4]["peak_bytes"] = None
    rows = summarise(comparison, "m", outcomes, ["a", "b"])
    assert "| 1,234 | 5.0 |" in markdown(rows)
    assert next(csv.DictReader(csv_table(rows).splitlines()))["peak_bytes"] == "5000000000"
    assert r"1,234 & 5.0 \\" in latex(rows) and r"trainable \%" in latex(rows)


def test_a_diverged_learning_rate_is_never_the_best():
    about = {"model": "m", "method": "RoSA"}
    tried = [{"settings": {"learning_rate": 1.0}, "validation_loss": float("nan")}]
    tried += [{"settings": {"learning_rate": 0.1}, "diverged": "nan"}]
    tried += [{"settings": {"learning_rate": 0.01}, "validation_loss": 3.0}]
    assert best_rates([about | outcome for outcome in tried]) == {("m", "RoSA"): 0.01}


def test_the_miniature_of_the_repository_is_whole():
    comparison = load_comparison(ROOT / "configs" / "miniature.yaml")
    assert isinstance(comparison.miniature, MiniatureRecipe)
    assert len(comparison.seeds) >= 5 and len(comparison.learning_rates) >= 3
