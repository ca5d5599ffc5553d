"""What a person sees of an error: one line of the command's, and no traceback but of a mistake of our own."""

import io
import json
import sys

import pytest

from rosa.cli import main
from rosa.commands import info

from .tiny_qwen2 import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_tokenizer(["some words to say"])
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("the\nmessage"), 1, "rosa info: error: the message"),
        (PermissionError(13, "Permission denied", "file"), 1, "rosa info: error: [Errno 13] Permission denied: 'file'"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 1, "install the extra: pip install '.[train]'"),
        (ImportError("You need galore_torch", name=None), 1, "rosa info: error: You need galore_torch"),
        (KeyboardInterrupt(), 130, "rosa info: interrupted"),
        (KeyboardInterrupt("checkpoint-3 stands"), 130, "rosa info: interrupted: checkpoint-3 stands"),
        (KeyError("a mistake of our own"), None, None),
        (ModuleNotFoundError("No module named 'rosa.nothing'", name="rosa.nothing"), None, None),
    ],
)
def test_errors_for_people_are_one_line_and_mistakes_of_our_own_keep_their_traceback(
    error, status, line, capsys, monkeypatch
):
    def fail(argv):
        raise error

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(type(error) if status is None else SystemExit) as caught:
        main(["info"])
    told = capsys.readouterr().err
    if status is None:
        assert not told
    else:
        assert caught.value.code == status
        assert line in told and len(told.splitlines()) == 1


def told(argv, capsys):
    """The one line that a failing command says."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rosa ")]
    return line


def commands(base, tmp_path):
    """Commands that load a base, by name."""
    rows = [{"instruction": "say", "input": "", "output": "some words", "answer": "some words"}]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "test.json").write_text(json.dumps(rows))
    (tmp_path / "task" / "task.json").write_text(json.dumps({"answer": "text"}))
    data, out = str(tmp_path / "task" / "test.json"), str(tmp_path / "out")
    return {
        "train": ["train", "--model", str(base), "--data", data, "--output", out],
        "generate": ["generate", "--model", str(base), "--prompt", "some"],
        "inspect": ["inspect", "--model", str(base), "--data", data, "--output", out],
        "evaluate": ["evaluate", "--model", str(base), "--tasks", "task", "--data-dir", str(tmp_path), "--output", out],
    }


@pytest.mark.parametrize("command", ["train", "generate", "inspect", "evaluate"])
def test_a_base_that_cannot_be_loaded_is_told_by_every_command(base, tmp_path, capsys, command):
    argv = commands(base, tmp_path)[command]
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is truncated" in told(argv, capsys)
    weights.write_bytes(whole)
    for file in base.glob("tok*"):
        file.unlink()
    assert "holds no tokenizer" in told(argv, capsys)
    base.rename(tmp_path / "elsewhere")
    assert f"there is no folder {base}" in told(argv, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "rosa_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_an_adapter_is_no_base(base, tmp_path, capsys, command, name):
    (base / name).write_text("{}")  # transformers would load it on top, and nothing would say so
    assert f"{base} holds an adapter: give the model" in told(commands(base, tmp_path)[command], capsys)


@pytest.mark.parametrize("command", ["train", "inspect", "evaluate"])
def test_nothing_is_written_among_a_models_files(base, tmp_path, capsys, command):
    before = {path.name for path in base.iterdir()}
    assert f"{base} holds a model" in told([*commands(base, tmp_path)[command], "--output", str(base)], capsys)
    assert {path.name for path in base.iterdir()} == before


@pytest.mark.parametrize(
    ("command", "option", "before"),
    [
        ("generate", "prompt", []),
        ("generate", "instruction", []),
        ("generate", "input", ["--instruction", "a"]),
        ("chat", "system", []),
    ],
)
def test_an_argument_that_is_not_text_is_told_before_a_model_is_looked_for(command, option, before, capsys):
    text = b"caf\xe9".decode(errors="surrogateescape")  # as Python has an argument that is not UTF-8
    with pytest.raises(SystemExit) as end:
        main([command, "--model", "no/such/model", *before, f"--{option}", text])
    expected = rf"argument --{option}: must be text in UTF-8: character 3 is '\udce9', half of a surrogate pair"
    assert end.value.code == 2 and expected in capsys.readouterr().err


def test_a_question_on_the_standard_input_that_is_not_text_is_told_before_a_model_is_looked_for(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a \udc80"))
    assert "the standard input must be text in UTF-8: character 2" in told(["chat", "--model", "no/such/model"], capsys)
