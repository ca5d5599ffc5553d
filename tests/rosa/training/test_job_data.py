"""`rosa train` on data of any form: what it says, trains on, keeps and refuses; streams, and going on with them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from rosa.cli import main
from rosa.data.prompt_form import read_form
from rosa.training import job_data
from rosa.training.job_data import prepare
from rosa.training.parsing import parse
from tests.rosa.data import chat_templates
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

WORDS = ["apple", "river", "stone", "cloud", "tiger", "window", "garden", "bottle", "hammer", "pencil"]
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"I say {word}."}]}
    for word in WORDS
]
PAIRS = [{"prompt": f"Say {word}.", "completion": f" I say {word}."} for word in WORDS]
TEXTS = [{"text": f"Say {word}. I say {word}."} for word in WORDS]
BRIEF = ["--disable_tqdm", "true", "--dls", "false", "--rank", "2", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = tiny_tokenizer([row["text"] for row in TEXTS])
    tokenizer.chat_template = chat_templates.WITHOUT_MARKS
    tokenizer.save_pretrained(folder)
    tiny_model(len(tokenizer)).save_pretrained(folder)
    return folder


def write(folder, rows, name="rows.jsonl"):
    file = folder / name
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def arguments(base, data, output, *more):
    return ["--model", str(base), "--data", str(data), "--output", str(output), *BRIEF, *map(str, more)]


def train(*given):
    main(["train", *arguments(*given)])


def error(capsys, *given, code=1):
    with pytest.raises(SystemExit) as exit:
        train(*given)
    assert exit.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is about to be loaded."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rosa.training.finetune.load_model", load)


def test_a_folder_of_conversations_is_trained_on_and_what_is_left_says_how_prompts_are_written(base, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, CHATS[:6])
    write(folder, CHATS[6:], "more.parquet")
    train(base, folder, tmp_path / "out", "--max_steps", 2, "--save_steps", 1, "--save_total_limit", 1)
    assert "data: 10 conversations, 2 files" in capsys.readouterr().out
    assert read_form(tmp_path / "out") == read_form(tmp_path / "out" / "checkpoint-2") == "chat"
    assert not (tmp_path / "out" / "checkpoint-1").exists()


@pytest.mark.parametrize(
    ("rows", "form", "said"),
    [
        (PAIRS, "plain", "10 prompts with completions"),
        (TEXTS, "plain", "10 texts"),
        (CHATS, "chat", "10 conversations"),
    ],
)
def test_every_form_of_rows_becomes_examples(base, tmp_path, rows, form, said):
    file = write(tmp_path, rows)
    data = prepare(*parse(arguments(base, file, tmp_path / "out", "--val_size", 3)))
    assert (data.form.prompts, data.summary) == (form, f"data: {said}, 1 file")
    assert (len(data.train), len(data.validation), len(data.identity())) == (7, 3, 10)
    answers = [data.tokenizer.decode(ids) for part in (data.train, data.validation) for ids in part["input_ids"]]
    assert sorted(next(word for word in WORDS if f"I say {word}." in answer) for answer in answers) == sorted(WORDS)


@pytest.mark.parametrize(("share", "held_out"), [("0.01", 1), ("0.3", 3), ("0.55", 6)])
def test_a_share_of_the_rows_is_held_out(base, tmp_path, share, held_out):
    data = prepare(*parse(arguments(base, write(tmp_path, CHATS), tmp_path / "out", "--val_size", share)))
    assert (len(data.train), len(data.validation)) == (10 - held_out, held_out)


def test_of_a_prompt_the_completion_is_learnt_and_of_a_text_everything(base, tmp_path):
    for rows, learnt in ((PAIRS, " I say apple.<|endoftext|>"), (TEXTS, "Say apple. I say apple.<|endoftext|>")):
        data = prepare(*parse(arguments(base, write(tmp_path, rows), tmp_path / "out")))
        example = data.train[0]
        assert data.tokenizer.decode(example["input_ids"]) == "Say apple. I say apple.<|endoftext|>"
        assert data.tokenizer.decode([i for i in example["labels"] if i != -100]) == learnt


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*CHATS, {"text": "a"}], (), r"rows\.jsonl, line 11: has no `messages`, only text"),
        ([*TEXTS, {"text": 3}], (), r"rows\.jsonl, line 11: `text` must be a string, got a number 3"),
        ([{**CHATS[0], **PAIRS[0]}], (), "line 1: the columns .* may be read as conversations or as prompt_completion"),
        (TEXTS, ("--data_format", "conversations"), "line 1: has no `messages`, only text"),
        (TEXTS, ("--data_split", "test"), "Leave out --data_split"),
        (TEXTS, ("--data_config", "main"), "Leave out --data_split, --data_config"),
        (TEXTS, ("--data_revision", "main"), "and --data_revision"),
        (CHATS, ("--val_size", "10"), "val_size must leave at least one of the 10 rows"),
        (CHATS, ("--val_size", "0.95"), "val_size must leave at least one of the 10 rows"),
        (CHATS, ("--streaming", "--max_steps", "1", "--val_size", "11"), "val_size takes the first rows of a stream"),
    ],
)
def test_what_does_not_fit_is_named_before_a_model_is_loaded(base, tmp_path, capsys, no_model, rows, options, message):

    assert re.search(message, error(capsys, base, write(tmp_path, rows), tmp_path / "out", *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--streaming",), "--streaming needs --max_steps"),
        (("--streaming", "--max_steps", "2", "--train_sampling_strategy", "group_by_length"), "leave out one"),
        (("--data_format", "parquet"), "invalid choice: 'parquet'"),
        (("--dry_run", "perhaps"), "argument --dry_run"),
        (("--streaming", "perhaps"), "argument --streaming"),
    ],
)
def test_options_that_make_no_run_are_refused_before_anything_is_read(capsys, options, message):
    assert message in error(capsys, "nothing", "nowhere.jsonl", "out", *options, code=2)


def test_conversations_need_a_chat_template(base, tmp_path, capsys, no_model):
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    assert "chat template" in error(capsys, plain, write(tmp_path, CHATS), tmp_path / "out")


def test_a_stream_is_read_again_and_again_without_the_rows_held_out(base, tmp_path, capsys):
    file = write(tmp_path, CHATS)
    job, args = parse(arguments(base, file, tmp_path / "out", "--streaming", "--max_steps", 1, "--val_size", 4))
    data = prepare(job, args)
    assert data.summary == "data: a stream of conversations, 1 file"
    answers = [data.tokenizer.decode(example["input_ids"]) for example in data.train.take(18)]
    words = [next(word for word in WORDS if word in answer) for answer in answers]
    assert set(words) == set(WORDS[4:]) and len(data.validation) == 4
    assert words[:6] != WORDS[4:10]  # they are mixed


def test_a_stream_names_the_row_that_does_not_fit_when_it_comes_to_it(base, tmp_path, capsys):
    file = write(tmp_path, [*CHATS, {"messages": []}])
    told = error(capsys, base, file, tmp_path / "out", "--streaming", "--max_steps", 2)
    assert "rows.jsonl, line 11: `messages` has no message of the assistant" in told


def test_a_stream_that_teaches_nothing_is_an_error(base, tmp_path, capsys):
    with pytest.warns(UserWarning, match=r"max_length=3 cuts off the whole response of .*line 1; such rows"):
        told = error(
            capsys, base, write(tmp_path, CHATS), tmp_path / "o", "--streaming", "--max_steps", 2, "--max_length", 3
        )
    assert "has no row to train on after the first 0, or none of which max_length=3 leaves something" in told


def test_a_stream_goes_on_as_if_it_had_not_stopped(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job_data, "SHUFFLED", 4)
    file = write(tmp_path, TEXTS)
    steps = ["--streaming", "--lr_scheduler_type", "constant", "--save_steps", 5]
    train(base, file, tmp_path / "whole", *steps, "--max_steps", 10)
    train(base, file, tmp_path / "parts", *steps, "--max_steps", 5)
    train(base, file, tmp_path / "parts", *steps, "--max_steps", 10, "--resume")
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all((whole[name] == parts[name]).all() for name in whole)

    write(tmp_path, TEXTS[:-1])
    told = error(capsys, base, file, tmp_path / "parts", *steps, "--max_steps", 12, "--resume")
    assert "was made with other settings: data was" in told


def test_a_stream_of_the_hub_is_resumed_at_a_commit_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: iter(TEXTS))
    streamed = ["--streaming", "--max_steps", 2, "--resume"]
    with pytest.raises(ValueError, match="give --data_revision the commit of someone/data"):
        prepare(*parse(arguments(base, "someone/data", tmp_path / "out", *streamed, "--data_revision", "main")))
    data = prepare(*parse(arguments(base, "someone/data", tmp_path / "out", *streamed, "--data_revision", "0a" * 20)))
    assert data.identity() == ["text", "someone/data", None, None, "0a" * 20]


def test_a_file_of_another_form_is_another_run(base, tmp_path, capsys):
    train(base, write(tmp_path, TEXTS), tmp_path / "out", "--max_steps", 1, "--save_steps", 1)
    told = error(capsys, base, write(tmp_path, PAIRS), tmp_path / "out", "--max_steps", 2, "--resume")
    assert "was made with other settings: data was" in told
