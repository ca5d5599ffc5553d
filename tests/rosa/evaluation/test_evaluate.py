"""Evaluation of a tiny real model: scores, predictions on disk, resumption, and `rosa evaluate`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from scipy.stats import binomtest

import rosa
from rosa.cli import main
from rosa.data.prompt_form import CHAT, INSTRUCTION
from rosa.data.prompts import prompt
from rosa.evaluation.evaluate import Evaluation, Score, evaluate
from rosa.evaluation.generation import answer, stop_ids
from rosa.evaluation.tasks import TASKS, Task, load_test_rows
from rosa.storage.locking import alone_in
from tests.rosa.conftest import stir
from tests.rosa.tiny_qwen2 import TAUGHT, taught_to_chat, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
REAL_DATA = ROOT.parent / "shared" / "data" / "benchmarks"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not at ../shared/data")

WORDS = ("apple", "river", "stone", "cloud", "tiger", "window", "garden", "bottle")
OWN, SUMS = Task("own", "text"), TASKS["AddSub"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer([prompt(" ".join(WORDS), "once")], vocab_size=320)


@pytest.fixture
def model(tokenizer):
    # Wide weights keep the two best tokens apart, so that rounding cannot decide.
    return tiny_model(len(tokenizer), initializer_range=0.3)


def some_rows(count, answer="0"):
    texts = [" ".join(WORDS[(index * step) % 8] for step in range(1 + index % 5)) for index in range(count)]
    return [{"instruction": f"{index} {text}", "input": "", "answer": answer} for index, text in enumerate(texts)]


def lines(folder, name="own"):
    text = (folder / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Scores


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (8, 10), (0, 300), (254, 254), (1043, 1319)])
def test_interval_is_wilsons(correct, total):
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert Score(correct, total).interval == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_average_is_over_rows_not_over_tasks():
    evaluation = Evaluation({"gsm8k": Score(1, 2), "AQuA": Score(8, 8)})
    assert evaluation.average == Score(9, 10)
    assert evaluation.average.accuracy == 90
    result = json.loads(json.dumps(evaluation.to_dict()))
    assert result["tasks"]["gsm8k"] == {"correct": 1, "total": 2, "accuracy": 50.0, "interval": [*Score(1, 2).interval]}
    assert result["average"]["accuracy"] == 90
    assert evaluation.table().splitlines() == [
        "task           correct  total  accuracy  95 % interval",
        "gsm8k                1      2   50.00 %  9.45 to 90.55",
        "AQuA                 8      8  100.00 %  67.56 to 100.00",
        "micro-average        9     10   90.00 %  59.58 to 98.21",
    ]


# Evaluating


def test_rows_are_answered_with_the_papers_prompt_and_judged(model, tokenizer, tmp_path, capsys):
    rows = some_rows(4)
    rows[3]["input"] = "once"
    truths = answer(model, tokenizer, [prompt(row["instruction"], row["input"]) for row in rows], max_new_tokens=6)
    for index in (0, 3):
        rows[index]["answer"] = truths[index]
    evaluation = evaluate(model, tokenizer, {OWN: rows, SUMS: some_rows(3)}, tmp_path, max_new_tokens=6)
    assert evaluation.scores["own"] == Score(2, 4)
    assert list(evaluation.scores) == ["own", "AddSub"]
    written = sorted(lines(tmp_path), key=lambda line: line["row"])
    assert [line["prediction"] for line in written] == truths
    assert [line["correct"] for line in written] == [True, False, False, True]
    assert list(written[3]) == ["row", "instruction", "input", "answer", "prediction", "extracted", "correct"]
    assert [written[3][field] for field in ("instruction", "input", "answer")] == [*rows[3].values()]
    assert len(lines(tmp_path, "AddSub")) == 3
    error = capsys.readouterr().err
    assert "7/7" in error and "own" in error


def test_predictions_do_not_depend_on_the_batch_size(model, tokenizer, tmp_path):
    rows = some_rows(16)
    predictions = []
    for size in (1, 3, 8):
        evaluate(model, tokenizer, {OWN: rows}, tmp_path / str(size), max_new_tokens=12, batch_size=size)
        predictions.append(sorted((line["row"], line["prediction"]) for line in lines(tmp_path / str(size))))
    assert predictions[0] == predictions[1] == predictions[2]
    assert len({text for _, text in predictions[0]}) > 8


class Stop(Exception):
    """Ends a run between two batches."""


def stop_after(model, batches):
    """The model, which answers so many batches and then fails, as a run that dies does."""
    generate, left = type(model).generate, iter(range(batches))

    def counted(**options):
        if next(left, None) is None:
            raise Stop
        return generate(model, **options)

    model.generate = counted
    return model


def test_run_that_died_goes_on_where_it_was(model, tokenizer, tmp_path):
    tasks = {OWN: some_rows(10), SUMS: some_rows(10)}
    whole = evaluate(model, tokenizer, tasks, tmp_path / "whole", max_new_tokens=6, batch_size=2)
    with pytest.raises(Stop):
        evaluate(stop_after(model, 7), tokenizer, tasks, tmp_path / "broken", max_new_tokens=6, batch_size=2)
    assert (len(lines(tmp_path / "broken")), len(lines(tmp_path / "broken", "AddSub"))) == (10, 4)

    file = tmp_path / "broken" / "predictions" / "AddSub.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b'{"row": 9, "instruction": "ha')
    again = evaluate(stop_after(model, 3), tokenizer, tasks, tmp_path / "broken", max_new_tokens=6, batch_size=2)
    assert again == whole
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_predictions_are_on_disk_after_each_batch(model, tokenizer, tmp_path):
    generate, seen = type(model).generate, []

    def count(**options):
        seen.append(len(lines(tmp_path)))
        return generate(model, **options)

    model.generate = count
    evaluate(model, tokenizer, {OWN: some_rows(5)}, tmp_path, max_new_tokens=4, batch_size=2)
    assert seen == [0, 2, 4]


def test_finished_evaluation_decodes_nothing_and_can_be_extended(model, tokenizer, tmp_path):
    rows = some_rows(9)
    evaluate(model, tokenizer, {OWN: rows[:4]}, tmp_path, max_new_tokens=6)
    first = evaluate(model, tokenizer, {OWN: rows}, tmp_path, max_new_tokens=6)
    before = contents(tmp_path)
    assert evaluate(stop_after(model, 0), tokenizer, {OWN: rows}, tmp_path, max_new_tokens=6) == first
    assert evaluate(model, tokenizer, {OWN: rows[:2]}, tmp_path, max_new_tokens=6).scores["own"].total == 2
    assert contents(tmp_path) == before
    assert sorted(line["row"] for line in lines(tmp_path)) == list(range(9))


def test_predictions_are_judged_again_by_the_form_and_the_truth_of_today(model, tokenizer, tmp_path):
    rows = some_rows(4)
    texts = answer(model, tokenizer, [prompt(row["instruction"]) for row in rows], max_new_tokens=6)
    evaluate(model, tokenizer, {OWN: rows}, tmp_path, max_new_tokens=6)
    for row, text in zip(rows, texts, strict=True):
        row["answer"] = text
    model = stop_after(model, 0)
    assert evaluate(model, tokenizer, {OWN: rows}, tmp_path, max_new_tokens=6).average == Score(4, 4)
    assert [(line["answer"], line["correct"]) for line in lines(tmp_path)] == [(text, True) for text in texts]

    other_form = Task("own", ("yes", "no"))
    assert evaluate(model, tokenizer, {other_form: some_rows(4, "no")}, tmp_path, max_new_tokens=6).average.correct == 0
    assert {line["extracted"] for line in lines(tmp_path)} == {None}
    assert [line["prediction"] for line in lines(tmp_path)] == texts


def test_verdicts_of_an_earlier_version_are_not_believed(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, {OWN: some_rows(3)}, tmp_path, max_new_tokens=6)
    file, before = tmp_path / "predictions" / "own.jsonl", contents(tmp_path)
    file.write_text("".join(json.dumps({**line, "correct": True, "extracted": "0"}) + "\n" for line in lines(tmp_path)))
    again = evaluate(stop_after(model, 0), tokenizer, {OWN: some_rows(3)}, tmp_path, max_new_tokens=6)
    assert again.average.correct == 0
    assert contents(tmp_path) == before


def test_predictions_of_a_tokenizer_that_nothing_is_known_of_are_refused(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path, max_new_tokens=6)
    beside = tmp_path / "predictions" / "own.made_with.json"
    beside.write_text(json.dumps({k: v for k, v in json.loads(beside.read_text()).items() if k != "tokenizer"}))
    with pytest.raises(ValueError, match="other settings: tokenizer was None, now [0-9a-f]{16}"):
        evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path, max_new_tokens=6)


def test_other_tokens_that_end_an_answer_make_other_predictions(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path, max_new_tokens=6)
    model.generation_config.eos_token_id = [5, 7]
    with pytest.raises(ValueError, match="other settings: stop was "):
        evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path, max_new_tokens=6)


def test_conversations_end_where_they_were_learnt_to_end_and_predictions_say_so(tmp_path):
    model, tokenizer = taught_to_chat()
    rows = [{"instruction": asked, "input": "", "answer": said} for asked, said in TAUGHT]
    found = evaluate(model, tokenizer, {Task("own", "text"): rows}, tmp_path, form=CHAT, max_new_tokens=12)
    assert found.average.correct == 2
    made = json.loads((tmp_path / "predictions" / "own.made_with.json").read_text())
    assert made["stop"] == stop_ids(model, tokenizer, CHAT) != stop_ids(model, tokenizer, INSTRUCTION)


def test_run_on_the_first_rows_leaves_the_lines_of_the_others(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, {OWN: some_rows(4)}, tmp_path, max_new_tokens=6)
    before = lines(tmp_path)
    evaluate(model, tokenizer, {OWN: some_rows(2, answer="1")}, tmp_path, max_new_tokens=6)
    assert [line["answer"] for line in lines(tmp_path)] == ["1", "1", "0", "0"]
    assert lines(tmp_path)[2:] == before[2:]


def test_two_processes_do_not_write_in_one_folder(model, tokenizer, tmp_path):
    with alone_in(tmp_path / "predictions"):
        with pytest.raises(ValueError, match=f"another process is at work in {tmp_path / 'predictions'}"):
            evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path, max_new_tokens=6)
        assert [path.name for path in contents(tmp_path)] == [".lock"]


def test_caller_may_have_locked_the_folder_itself(model, tokenizer, tmp_path):
    with alone_in(tmp_path):
        assert evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path, max_new_tokens=6).average.total == 2


@pytest.mark.parametrize("name", ["own.jsonl", "own.made_with.json"])
@pytest.mark.parametrize("finished", [True, False])
def test_nothing_is_written_through_a_link(model, tokenizer, tmp_path, name, finished):
    folder, elsewhere = tmp_path / "out" / "predictions", tmp_path / "elsewhere"
    if finished:
        evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path / "out", max_new_tokens=6)
        (folder / name).rename(elsewhere)
        before = elsewhere.read_bytes()
    else:
        folder.mkdir(parents=True)
        elsewhere.write_bytes(before := b"")
    (folder / name).symlink_to(elsewhere)
    evaluate(model, tokenizer, {OWN: some_rows(4)}, tmp_path / "out", max_new_tokens=6)
    assert elsewhere.read_bytes() == before
    assert not (folder / name).is_symlink() and len(lines(tmp_path / "out")) == 4


def other_weights(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 7}, "max_new_tokens was 6, now 7"),
        ({"made_with": {"adapter": "b"}}, "adapter was a, now b"),
        ({"made_with": None}, "adapter was a, now None; weights was None, now"),
        (
            {"tokenizer": tiny_tokenizer(["other words"], vocab_size=320)},
            "tokenizer was [0-9a-f]{16}, now [0-9a-f]{16}",
        ),
        ({"tasks": {OWN: some_rows(3)[::-1]}}, "belong to other rows: row [02] differs"),
    ],
)
def test_predictions_made_otherwise_are_refused_and_kept(model, tokenizer, tmp_path, changes, message):
    options = {"tokenizer": tokenizer, "tasks": {OWN: some_rows(3)}, "max_new_tokens": 6, "made_with": {"adapter": "a"}}
    evaluate(model, folder=tmp_path, **options)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{message}.*choose another folder \(--output\), or overwrite what is there"):
        evaluate(model, folder=tmp_path, **{**options, **changes})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [other_weights, lambda model: stir(rosa.patch(model)), lambda model: model.double()])
def test_predictions_of_another_model_are_refused(model, tokenizer, tmp_path, change):
    tasks = {OWN: some_rows(2)}
    evaluate(model, tokenizer, tasks, tmp_path, max_new_tokens=6)
    change(model)
    with pytest.raises(ValueError, match="belong to another model or other settings: weights was"):
        evaluate(model, tokenizer, tasks, tmp_path, max_new_tokens=6)
    evaluate(model, tokenizer, tasks, tmp_path, max_new_tokens=6, overwrite=True)
    assert evaluate(stop_after(model, 0), tokenizer, tasks, tmp_path, max_new_tokens=6).average.total == 2


def test_overwriting_leaves_other_tasks_alone(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, {OWN: some_rows(2), SUMS: some_rows(2)}, tmp_path, max_new_tokens=6)
    before = contents(tmp_path)
    evaluate(model, tokenizer, {SUMS: some_rows(3)}, tmp_path, max_new_tokens=4, overwrite=True)
    after = contents(tmp_path)
    assert {path.name for path in before if before[path] != after[path]} == {"AddSub.jsonl", "AddSub.made_with.json"}
    assert len(lines(tmp_path, "AddSub")) == 3


def test_damaged_predictions_are_named(model, tokenizer, tmp_path):
    tasks = {OWN: some_rows(3)}
    evaluate(model, tokenizer, tasks, tmp_path, max_new_tokens=6)
    file = tmp_path / "predictions" / "own.jsonl"
    first, second, third = file.read_text().splitlines(keepends=True)
    file.write_text(first + second[:9] + "\n" + third)
    with pytest.raises(ValueError, match="own.jsonl, line 2 is damaged"):
        evaluate(model, tokenizer, tasks, tmp_path, max_new_tokens=6)
    (tmp_path / "predictions" / "own.made_with.json").unlink()
    with pytest.raises(
        ValueError, match="own.made_with.json does not say what the predictions in .*own.jsonl were made"
    ):
        evaluate(model, tokenizer, tasks, tmp_path, max_new_tokens=6)


def test_nothing_to_evaluate_and_bad_truths_are_errors(model, tokenizer, tmp_path):
    for tasks in ({}, {OWN: []}):
        with pytest.raises(ValueError, match="there is nothing to evaluate"):
            evaluate(model, tokenizer, tasks, tmp_path)
    with pytest.raises(ValueError, match="`answer` must be a number"):
        evaluate(model, tokenizer, {SUMS: some_rows(2, answer="two")}, tmp_path)
    with pytest.raises(ValueError, match="^max_new_tokens must be at least 1, got 0$"):
        evaluate(model, tokenizer, {OWN: some_rows(2)}, tmp_path, max_new_tokens=0)
    assert not contents(tmp_path)


@pytest.mark.parametrize("field", ["instruction", "input", "answer"])
def test_row_with_half_a_surrogate_pair_is_named(model, tokenizer, tmp_path, field):
    rows = some_rows(3)
    rows[1][field] = json.loads('"ab\\udc80"')
    with pytest.raises(ValueError, match=r"own, row 1: character 2 is '\\udc80', half of a surrogate pair"):
        evaluate(model, tokenizer, {OWN: rows}, tmp_path)
    assert not contents(tmp_path)


DEEP = pytest.param("[" * 100_000, id="deep")


@pytest.mark.parametrize("line", ["5", "null", "[]", '{"row": "0"}', '{"row": 0, "instruction": "i"}', DEEP])
def test_line_of_another_kind_is_damage(model, tokenizer, tmp_path, line):
    evaluate(model, tokenizer, {OWN: some_rows(1)}, tmp_path, max_new_tokens=6)
    with open(tmp_path / "predictions" / "own.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"own.jsonl, line 2 is damaged"):
        evaluate(model, tokenizer, {OWN: some_rows(1)}, tmp_path, max_new_tokens=6)


@pytest.mark.parametrize("about", ["5", "null", "[]", DEEP, ""])
def test_predictions_without_their_origin_are_refused(model, tokenizer, tmp_path, about):
    evaluate(model, tokenizer, {OWN: some_rows(1)}, tmp_path, max_new_tokens=6)
    (tmp_path / "predictions" / "own.made_with.json").write_text(about)
    with pytest.raises(ValueError, match="own.made_with.json does not say what the predictions in"):
        evaluate(model, tokenizer, {OWN: some_rows(1)}, tmp_path, max_new_tokens=6)


# The command


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(len(tokenizer), initializer_range=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in {"own": some_rows(40), "AddSub": some_rows(5)}.items():
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps(rows))
    (folder / "own" / "task.json").write_text('{"answer": "text"}')
    return folder


def args(base, data, output, *more):
    fixed = ["--model", base, "--data-dir", data, "--output", output, "--tasks", "own,AddSub", "--max-new-tokens", 8]
    return ["evaluate", *map(str, (*fixed, *more))]


def error_of(argv, capsys, code=1):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_command_prints_the_table_and_writes_the_results(base, data, tmp_path, capsys):
    main(args(base, data, tmp_path, "--limit", 3))
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["task", "own", "AddSub", "micro-average"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["model"], results["adapter"], results["max_new_tokens"]) == (str(base), None, 8)
    assert [results["tasks"][name]["total"] for name in ("own", "AddSub")] == [3, 3]
    assert results["average"]["total"] == 6


def save_rosas(model, folder):
    rosa.save_adapter(stir(rosa.patch(model, rosa.RosaConfig(alpha=1.0))), folder)


def save_pefts(model, folder):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_rosas, save_pefts])
def test_adapter_changes_the_answers_and_is_part_of_what_they_belong_to(save, base, data, model, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    save(model, adapter)
    limit = ("--limit", 4, "--tasks", "own")
    main(args(base, data, tmp_path / "bare", *limit))
    main(args(base, data, tmp_path / "tuned", *limit, "--adapter", adapter))
    bare, tuned = ([line["prediction"] for line in lines(tmp_path / name)] for name in ("bare", "tuned"))
    assert bare != tuned
    error = error_of(args(base, data, tmp_path / "bare", *limit, "--adapter", adapter), capsys)
    assert "belong to another model or other settings: " in error and "--overwrite" in error
    main(args(base, data, tmp_path / "bare", *limit, "--adapter", adapter, "--overwrite"))
    assert [line["prediction"] for line in lines(tmp_path / "bare")] == tuned


def test_predictions_of_another_model_are_told_before_this_one_is_loaded(base, data, tmp_path, capsys):
    main(args(base, data, tmp_path / "out", "--limit", 1))
    before = contents(tmp_path / "out")
    other = shutil.copytree(base, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"cannot be loaded")
    error = error_of(args(other, data, tmp_path / "out", "--limit", 1), capsys)
    assert "belong to another model or other settings: model was " in error and "folder (--output), or" in error
    assert "weights was" not in error and contents(tmp_path / "out") == before
    error = error_of(args(base, data, tmp_path / "out", "--limit", 1, "--max-new-tokens", 9), capsys)
    assert "max_new_tokens was 8, now 9" in error


def test_killed_process_resumes_to_the_same_predictions(base, data, tmp_path, capsys):
    options = ("--batch-size", 2, "--max-new-tokens", 24)
    main(args(base, data, tmp_path / "whole", *options))
    table = capsys.readouterr().out

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "rosa", *args(base, data, tmp_path / "broken", *options)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    file = tmp_path / "broken" / "predictions" / "own.jsonl"
    deadline = time.monotonic() + 100
    while not (file.exists() and file.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = lines(tmp_path / "broken")
    assert 6 <= len(before) < 40
    assert not (tmp_path / "broken" / "results.json").exists()

    main(args(base, data, tmp_path / "broken", *options))
    assert capsys.readouterr().out == table
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    after = {line["row"]: line for line in lines(tmp_path / "broken")}
    assert all(after[line["row"]] == after[line["row"]] | line for line in before)


@pytest.mark.parametrize("config", ["5", "null", "true", '"x"', "[]"])
def test_adapter_whose_configuration_is_no_object_is_told(data, tmp_path, config, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text(config)
    error = error_of(args("no/such/model", data, tmp_path / "out", "--adapter", adapter), capsys)
    assert f"{adapter}/adapter_config.json is damaged: an object in JSON was expected" in error


@pytest.mark.parametrize("file", ["own/task.json", "own/test.json", "adapter/adapter_config.json"])
def test_deeply_nested_json_is_told_by_file(data, tmp_path, file, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "adapter").mkdir()
    (tmp_path / "data" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "data" / file).write_text("[" * 100_000)
    adapter = ("--adapter", tmp_path / "data" / "adapter") if file.startswith("adapter") else ()
    error = error_of(args("no/such/model", tmp_path / "data", tmp_path / "out", *adapter), capsys)
    assert error.startswith("rosa evaluate: error: ") and str(tmp_path / "data" / file) in error


def test_scale_of_an_adapter_is_part_of_what_predictions_belong_to(base, data, model, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    save_pefts(model, adapter)
    main(args(base, data, tmp_path / "out", "--limit", 1, "--adapter", adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    error = error_of(args(base, data, tmp_path / "out", "--limit", 1, "--adapter", adapter), capsys)
    assert "belong to another model or other settings: adapter was " in error


def test_damaged_base_is_told_by_file(base, data, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"damaged")
    error = error_of(args(tmp_path / "base", data, tmp_path / "out"), capsys)
    assert f"the model in {tmp_path / 'base'} cannot be loaded: model.safetensors is truncated" in error
    assert not (tmp_path / "out").exists()


def test_results_replace_a_link(base, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").write_text("theirs")
    (tmp_path / "out" / "results.json").symlink_to(tmp_path / "elsewhere")
    main(args(base, data, tmp_path / "out", "--limit", 1))
    assert (tmp_path / "elsewhere").read_text() == "theirs"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["average"]["total"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "own,bolq"], "there is no task 'bolq': did you mean boolq?"),
        (["--tasks", "boolq"], "there is no folder {data}/boolq"),
        (["--data-dir", "nowhere"], "there is no folder nowhere"),
        (["--adapter", "nowhere"], "there is no adapter folder nowhere"),
        (["--adapter", "{data}"], "{data} holds no complete adapter: adapter_model.safetensors is missing"),
        (["--output", "{data}/own/test.json"], "--output {data}/own/test.json is not a folder"),
        (["--output", "{data}/own/test.json/out"], "cannot be made, as {data}/own/test.json is not a folder"),
    ],
)
def test_bad_input_is_told_in_one_line_before_the_model_loads(data, tmp_path, options, message, capsys):
    options = [option.format(data=data) for option in options]
    error = error_of(args("no/such/model", data, tmp_path / "out", *options), capsys)
    assert error.startswith("rosa evaluate: error: ")
    assert message.format(data=data) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--batch-size", "--max-new-tokens", "--limit"])
def test_numbers_below_one_are_refused(data, tmp_path, option, capsys):
    error = error_of(args("no/such/model", data, tmp_path, option, 0), capsys, code=2)
    assert f"argument {option}: must be at least 1, got 0" in error


@needs_real_data
def test_real_rows_run_through(base, tmp_path, capsys):
    names = [name for name in TASKS if name != "hellaswag"]
    tasks = ",".join(names)
    main(["evaluate", "--model", str(base), "--tasks", tasks, "--data-dir", str(REAL_DATA), "--limit", "1",
          "--output", str(tmp_path), "--max-new-tokens", "4"])  # fmt: skip
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == names
    for name in names:
        row = load_test_rows(TASKS[name], REAL_DATA)[0]
        assert [(line["instruction"], line["answer"]) for line in lines(tmp_path, name)] == [
            (row["instruction"], row["answer"])
        ]
