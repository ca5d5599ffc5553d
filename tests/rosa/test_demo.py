"""The demo: its problems, its tokenizer, its cache, and a very small run from end to end."""

import re
import shlex
from functools import partial

import pytest

from rosa.data.prompts import prompt
from rosa.miniature.problems import LARGEST_RESULT, SEEN, UNSEEN, Kind, exact_match, final_number, generate

BOTH = {**SEEN, **UNSEEN}


@pytest.fixture(scope="module")
def problems():
    return generate(BOTH, train=900, held_out=100, seed=0)


def test_a_seed_determines_the_problems():
    assert generate(BOTH, 50, 10, seed=3) == generate(BOTH, 50, 10, seed=3)
    assert generate(BOTH, 50, 10, seed=3) != generate(BOTH, 50, 10, seed=4)


def test_held_out_problems_are_not_trained_on(problems):
    train, held_out = ({row["instruction"] for row in rows} for rows in problems)
    assert (len(train), len(held_out)) == (900, 100)
    assert not train & held_out


def test_every_step_of_every_solution_is_right(problems):
    for row in problems.train:
        *steps, conclusion = row["output"].split(". ")
        results = []
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
            assert int(result) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
            results.append(int(result))
        assert conclusion == f"The answer is {row['answer']}"
        assert results[-1] == row["answer"]
        assert all(1 <= result <= LARGEST_RESULT for result in results)


def test_every_number_of_a_question_is_in_its_solution(problems):
    for row in problems.train:
        assert set(re.findall(r"\d+", row["instruction"])) <= set(re.findall(r"\d+", row["output"])), row


@pytest.mark.parametrize("name", BOTH)
def test_every_field_of_every_wording_is_filled(name):
    for wording in BOTH[name].templates:
        rows = generate({name: Kind(BOTH[name].steps, (wording,))}, 20, 0, seed=0).train
        assert not any("{" in row["instruction"] or "}" in row["instruction"] for row in rows)


@pytest.mark.parametrize(
    "text, number",
    [("3 + 4 = 7. The answer is 7", 7), ("The answer is 12.\n", 12), ("-3", -3), ("7 apples", None), ("", None)],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_exact_match_is_a_percentage():
    rows = [{"answer": 7}, {"answer": 8}, {"answer": 9}, {"answer": 10}]
    assert exact_match(["The answer is 7", "The answer is 80", "", "10."], rows) == 50.0


def test_the_tokenizer_round_trips_and_keeps_digits_apart(problems, tmp_path):
    from transformers import AutoTokenizer

    from rosa.miniature.base import make_tokenizer

    make_tokenizer(problems.train).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # as `rosa generate` loads it
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    texts = [text for row in problems.held_out for text in (prompt(row["instruction"]), row["output"])]
    for text in [*texts, prompt("Zoë pays 1234 €.", "Étienne: 56?"), " two  spaces\n\n\tand a tab "]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode(token) for token in ids]
        assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
    assert len(tokenizer(prompt("x"))["input_ids"]) == 3  # the fixed text is one token before, one after


@pytest.fixture
def sizes():
    from rosa.demo.run import Sizes
    from rosa.miniature.base import BaseRecipe
    from rosa.miniature.training import Schedule

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 32}
    recipe = BaseRecipe(**shape, schedule=Schedule(steps=4, batch_size=4, learning_rate=1e-3))
    return Sizes(recipe, base_problems=60, problems=40, held_out=8, steps=45, batch_size=2)


def test_demo_from_end_to_end(sizes, tmp_path, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rosa.adapters.disk import load_adapter
    from rosa.demo.run import refuse_others_work, run
    from rosa.evaluation.generation import answer

    run(tmp_path, 0, sizes)
    refuse_others_work(tmp_path)  # does not: a second demo may go there

    report = capfd.readouterr().out
    (base,) = (tmp_path / "base").iterdir()
    assert (base / "config.json").is_file()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    row = r"^{} +[\d.,]+( %| ms)? +[\d.,]+( %| ms)?$"
    labels = ("trainable parameters", "exact match, unseen kind: before", "time per step, median")
    for label in labels:
        assert re.search(row.format(label), report, re.MULTILINE), report
    rosa_parameters, lora_parameters = re.search(r"trainable parameters +([\d,]+) +([\d,]+)", report).groups()
    assert float(lora_parameters.replace(",", "")) == pytest.approx(float(rosa_parameters.replace(",", "")), rel=0.2)
    assert "8 of 8 answers are the same" in report
    command, printed = re.search(r"^  (\S+ -m rosa generate .*)\n  (.*)$", report, re.MULTILINE).groups()
    instruction = shlex.split(command)[-1]
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert printed == answer(model, AutoTokenizer.from_pretrained(base), [prompt(instruction)], max_new_tokens=40)[0]
    assert "right answer: " in report


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("adapter_model.safetensors", "adapter_model.safetensors"),
        ("notes.txt", "notes.txt"),
        ("adapter/adapter_model.safetensors", "adapter"),
        ("base/config.json", "base/config.json"),
    ],
)
def test_a_folder_that_holds_anything_else_than_a_demo_is_refused(tmp_path, file, named, capsys):
    from rosa.cli import main

    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(SystemExit):
        main(["demo", "--quick", "--output", str(tmp_path)])
    assert f"{tmp_path} already holds {named}, which no demo has made: choose" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / file]
    with pytest.raises(SystemExit):
        main(["demo", "--quick", "--output", str(tmp_path / file)])
    assert f"--output {tmp_path / file} is not a folder" in capsys.readouterr().err


def test_an_interrupted_base_is_not_used_and_a_whole_one_is(sizes, tmp_path, monkeypatch):
    from rosa.miniature import base

    rows = generate(SEEN, 60, 0, seed=0).train

    def interrupted(*arguments):
        arguments[-1].mkdir()
        (arguments[-1] / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(base, "_train_base", interrupted)
        with pytest.raises(KeyboardInterrupt):
            base.base_model(rows, sizes.base, 0, tmp_path)
    assert not list(tmp_path.iterdir())

    folder = base.base_model(rows, sizes.base, 0, tmp_path)
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    monkeypatch.setattr(base, "_train_base", interrupted)
    assert base.base_model(rows, sizes.base, 0, tmp_path) == folder
    with pytest.raises(KeyboardInterrupt):
        base.base_model(rows, sizes.base, 1, tmp_path)  # another seed, another base


def test_rosa_and_lora_are_trained_on_the_same_batches(sizes, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    from rosa.demo import methods
    from rosa.miniature import training
    from rosa.miniature.base import base_model

    batches = {}

    class Collator(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            batches[method].append([feature["input_ids"] for feature in features])
            return super().__call__(features, return_tensors)

    rows = generate(UNSEEN, 40, 0, seed=0).train
    base = base_model(rows, sizes.base, 0, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    monkeypatch.setattr(training, "DataCollatorForSeq2Seq", Collator)
    for method in (methods.fine_tune_rosa, partial(methods.fine_tune_lora, parameters=1000)):
        batches[method] = []
        method(base, tokenizer, rows, 5, 3, 0)
    of_rosa, of_lora = batches.values()
    assert len(of_rosa) >= 5 and of_rosa == of_lora
