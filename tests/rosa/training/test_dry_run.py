"""`rosa train --dry_run`: what it prints, and that it trains, loads and writes nothing."""

import json
import re

import pytest

from rosa.cli import main
from rosa.training.dry_run import GREEN, PLAIN, show
from tests.rosa.data import chat_templates
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

CHATS = [
    {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "it " * number + "is"}]}
    for number in range(1, 9)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model whose weights are not there."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = tiny_tokenizer([CHATS[-1]["messages"][1]["content"]])
    tokenizer.chat_template = chat_templates.WITHOUT_MARKS
    tokenizer.save_pretrained(folder)
    tiny_model(len(tokenizer)).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, CHATS)))
    return file


def run(capsys, base, data, output, *more):
    main(["train", "--model", str(base), "--data", str(data), "--output", str(output), *map(str, more)])
    return capsys.readouterr().out


def test_it_shows_examples_counts_and_memory_and_leaves_no_trace(base, data, tmp_path, capsys):
    out = run(capsys, base, data, tmp_path / "out", "--dry-run", "--max_length", 30, "--rank", 2)
    assert "data: 8 conversations, 1 file; prompts: chat" in out
    assert out.count("\nexample ") == 3 and "\033" not in out
    assert re.search(r"example 1: \d+ tokens, 4 of them learnt \(in ⟦ ⟧\)\n(.|\n)*?⟦it· is·<\|endoftext\|>·↵\n⟧", out)
    lengths = [int(n) for n in re.search(r"tokens a row: from (\d+) to (\d+)", out).groups()]
    assert lengths[1] == lengths[0] + 7
    assert re.search(r"\d of 8 rows are longer than --max_length 30, 0 left out", out)
    assert re.search(r"padding: \d+\.\d% of the tokens\n", out) and "trainable params: " in out
    assert re.search(r"memory of a step with 2 of the longest rows, 30 tokens each: \d\.\d\d GiB", out)
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_that_there_is_none(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = run(capsys, base, data, tmp_path / "out", "--dry_run", "--rank", 2)
    assert out.endswith("there is no GPU here to hold that against\n")


@pytest.mark.parametrize(
    ("method", "said"),
    [("lora", "memory of a step"), ("road", "memory of a step"), ("boft", "cannot be counted without values")],
)
def test_it_knows_every_method(base, data, tmp_path, capsys, method, said):
    out = run(capsys, base, data, tmp_path / "out", "--dry_run", "--method", method)
    assert "trainable params: " in out and said in out


def test_of_a_stream_it_looks_at_the_first_rows(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rosa.training.dry_run.STREAMED", 5)
    out = run(capsys, base, data, tmp_path / "out", "--dry_run", "--rank", 2, "--streaming", "--max_steps", 4)
    assert ", of which the first 5 are looked at" in out and "of 5 rows are longer" in out


def test_what_is_learnt_is_green_where_colours_are_shown(base):
    tokenizer = tiny_tokenizer(["it is"])
    ids = tokenizer("it is\n\x1b")["input_ids"]
    labels = [-100, *ids[1:]]
    first, *rest = [tokenizer.decode([i]) for i in ids]
    text = "·".join(rest).replace("\n", "↵\n").replace("\x1b", "\\x1b")
    assert show(ids, labels, tokenizer, colour=True) == f"{first}{GREEN}{text}{PLAIN}"
    assert show(ids, labels, tokenizer, colour=False) == f"{first}⟦{text}⟧"


def test_colours_are_shown_on_a_terminal_unless_they_are_not_wanted(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert GREEN in run(capsys, base, data, tmp_path / "out", "--dry_run", "--rank", 2)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert GREEN not in run(capsys, base, data, tmp_path / "out", "--dry_run", "--rank", 2)


def test_of_a_long_example_the_ends_are_shown(base):
    tokenizer = tiny_tokenizer(["it is"])
    text = show([5] * 250, [-100] * 250, tokenizer, colour=False)
    assert "... 50 tokens ..." in text and text.count("·") == 200


def test_a_base_without_a_configuration_is_told_in_a_line(base, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(capsys, tmp_path / "nowhere", data, tmp_path / "out", "--dry_run")
    assert "there is no folder" in capsys.readouterr().err
