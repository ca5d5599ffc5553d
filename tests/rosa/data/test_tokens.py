"""Reading instruction data, the prompt, and tokenised examples."""

import json
import warnings

import pytest

from rosa.data.prompts import prompt, prompt_ids
from rosa.data.rows import load_rows
from rosa.data.tokens import IGNORED_LABEL, tokenize
from tests.rosa.tiny_qwen2 import EOS, tiny_tokenizer

ROWS = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "The answer is 5."},
    {"instruction": "Translate to French.", "input": "Good day, sir", "output": "Bonjour, monsieur"},
]
TEXTS = [prompt(row["instruction"], row["input"]) + row["output"] for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(TEXTS)


def test_prompt_is_the_papers():
    assert prompt("Add 2 and 3.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 2 and 3.\n\n### Response:\n"
    )


def test_prompt_with_input_is_alpacas():
    assert prompt("Translate {this}.", "a {b} c") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTranslate {this}.\n\n### Input:\na {b} c\n\n### Response:\n"
    )


def test_json_file_is_read_with_every_field(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "i", "output": "", "answer": "7"}]))
    assert load_rows(str(file)) == [{"instruction": "i", "input": "", "output": "", "answer": "7"}]


def test_jsonl_file_is_read_past_blank_lines_byte_order_mark_and_line_separators(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [{"instruction": "one\u2028line", "output": "a"}, {"instruction": "i", "input": None, "output": "b"}]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_bytes(("\ufeff" + text + "\n\n").encode())
    rows = load_rows(str(file))
    assert [row["instruction"] for row in rows] == ["one\u2028line", "i"]
    assert [row["input"] for row in rows] == ["", ""]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"instruction": "i",\n "output": }]', "not valid JSON: line 2, column 12: Expecting value"),
        ("a.json", '{"instruction": "i", "output": "o"}', "must hold a list of objects, got an object"),
        ("a.json", '{"instruction": "i"}\n{"instruction": "j"}', "not valid JSON: line 2, column 1: Extra data"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", '[{"instruction": "i", "output": "o"}, 3]', "row 1: must be an object with .*, got a number 3"),
        ("a.json", '[{"instruction": "i", "answer": "o"}]', "row 0: has no `output`, only instruction, answer"),
        ("a.json", '[{"output": "o"}]', "row 0: has no `instruction`, only output"),
        ("a.json", "[{}]", "row 0: has no `instruction`, only nothing"),
        ("a.json", '[{"instruction": "i", "output": 5}]', "row 0: `output` must be a string, got a number 5"),
        ("a.json", '[{"instruction": null, "output": "o"}]', "row 0: `instruction` must be a string, got null"),
        (
            "a.json",
            '[{"instruction": "i", "input": ["x"], "output": "o"}]',
            r'row 0: `input` must .* got a list \["x"\]',
        ),
        ("a.json", '[{"instruction": "i", "output": true}]', "row 0: `output` must be a string, got a boolean true"),
        ("a.jsonl", '{"instruction": "i", "output": "o"}\n\n{"instruction": "i"\n', "not valid JSON: line 3, column "),
        (
            "a.jsonl",
            '{"instruction": "i", "output": "o"}\n"text"\n',
            'line 2: must be an object .*, got a string "text"',
        ),
        ("a.jsonl", '\n{"instruction": "i"}\n', "line 2: has no `output`"),
        ("a.jsonl", "\n \n", "is empty"),
        (
            "a.json",
            '[{"instruction": "i", "output": "o"}, {"instruction": "i", "output": "one\\udc80"}]',
            "row 1: `output` holds half a surrogate pair at character 3",
        ),
        ("a.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("a.txt", "instruction,output\n", "must be a .json, .jsonl, .csv or .parquet file"),
    ],
)
def test_bad_data_is_named_with_its_place(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_rows(str(file))


def test_file_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[\xff]")
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8 text: byte 1"):
        load_rows(str(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["missing.json", "missing.jsonl"])
def test_missing_file_is_an_error(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"there is no file .*{name}"):
        load_rows(str(tmp_path / name))


def test_anything_else_names_a_dataset(monkeypatch):
    import datasets

    def load(name, config, *, split, revision):
        return datasets.Dataset.from_list([{"instruction": f"{name} {split}", "input": None, "output": "o"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("someone/alpaca", split="validation")
    assert rows == [{"instruction": "someone/alpaca validation", "input": "", "output": "o"}]


def test_dataset_that_cannot_be_reached_is_a_missing_file(monkeypatch):
    import datasets

    def load(name, config, *, split, revision):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"someone/alpaca is neither a file .*Couldn't reach"):
        load_rows("someone/alpaca")


def test_example_is_prompt_response_and_eos_with_only_the_response_to_learn(tokenizer):
    data = tokenize(ROWS, tokenizer)
    assert data.column_names == ["input_ids", "attention_mask", "labels"]
    for example, text, row in zip(data, TEXTS, ROWS, strict=True):
        assert tokenizer.decode(example["input_ids"]) == text + EOS
        assert example["attention_mask"] == [1] * len(example["input_ids"])
        learnt = [label for label in example["labels"] if label != IGNORED_LABEL]
        assert tokenizer.decode(learnt) == row["output"] + EOS
        assert example["labels"][-len(learnt) :] == example["input_ids"][-len(learnt) :]


def test_examples_live_in_memory(tokenizer):
    assert tokenize(ROWS, tokenizer).cache_files == []


def test_prompt_is_learnt_on_request(tokenizer):
    for example in tokenize(ROWS, tokenizer, train_on_prompt=True):
        assert example["labels"] == example["input_ids"]


@pytest.mark.parametrize("template", ["$A", "<|bos|> $A", "$A <|endoftext|>", "<|bos|> $A <|endoftext|>"])
def test_special_tokens_come_first_as_the_tokenizer_adds_them_and_eos_last_and_once(template):
    tokenizer = tiny_tokenizer(TEXTS, template=template)
    starts = [tokenizer.bos_token_id] if "<|bos|>" in template else []
    for example, row in zip(tokenize(ROWS, tokenizer), ROWS, strict=True):
        ids = example["input_ids"]
        assert ids[: len(starts)] == starts
        assert ids.count(tokenizer.bos_token_id) == len(starts)
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        seen = prompt_ids([prompt(row["instruction"], row["input"])], tokenizer)[0]
        assert ids[: len(seen)] == seen
        assert example["labels"][: len(seen) + 1] == [IGNORED_LABEL] * len(seen) + [ids[len(seen)]]


def test_long_row_is_cut_off(tokenizer):
    whole = tokenize(ROWS[:1], tokenizer)[0]
    with pytest.warns(UserWarning, match="cuts off the end of the response of 1 of 1 rows, which then do not teach"):
        cut = tokenize(ROWS[:1], tokenizer, max_length=len(whole["input_ids"]) - 2)[0]
    assert {field: values[:-2] for field, values in whole.items()} == cut


def test_rows_cut_off_before_their_response_are_left_out_and_counted(tokenizer):
    rows = [ROWS[0], {**ROWS[0], "instruction": "Add 2 and 3. " * 50}]
    with pytest.warns(UserWarning, match="max_length=80 cuts off the whole response of 1 of 2 rows"):
        data = tokenize(rows, tokenizer, max_length=80)
    assert len(data) == 1


def test_rows_that_lose_the_end_of_their_response_are_counted_apart_from_those_left_out(tokenizer):
    rows = [ROWS[0], {**ROWS[0], "output": "word " * 50}, {**ROWS[0], "instruction": "Add 2 and 3. " * 50}]
    with pytest.warns(UserWarning) as told:
        data = tokenize(rows, tokenizer, max_length=80)
    assert [str(warning.message).partition(",")[0].partition(";")[0] for warning in told] == [
        "max_length=80 cuts off the whole response of 1 of 3 rows",
        "max_length=80 cuts off the end of the response of 1 of 3 rows",
    ]
    assert [example["input_ids"][-1] == tokenizer.eos_token_id for example in data] == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(ROWS, tokenizer, max_length=max(len(example["input_ids"]) for example in tokenize(ROWS, tokenizer)))


def test_no_response_left_in_any_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="max_length=5 cuts off the whole response of every row"):
        tokenize(ROWS, tokenizer, max_length=5)
    assert len(tokenize(ROWS, tokenizer, max_length=5, train_on_prompt=True)) == 2


def test_tokenizer_without_eos_is_an_error(tokenizer):
    tokenizer = tiny_tokenizer(TEXTS)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        tokenize(ROWS, tokenizer)


@pytest.mark.parametrize(("rows", "max_length"), [([], 8), (ROWS, 0)])
def test_nothing_to_tokenize_is_an_error(tokenizer, rows, max_length):
    with pytest.raises(ValueError, match=r"no rows|at least 1"):
        tokenize(rows, tokenizer, max_length=max_length)
