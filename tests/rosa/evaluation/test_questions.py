"""Rows that wait for an answer: what they may be, and how each is asked."""

import json

import pytest

from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN
from rosa.data.prompts import question_ids
from rosa.evaluation.questions import check_form, load_questions, question
from tests.rosa.tiny_qwen2 import tiny_tokenizer

USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
SYSTEM = {"role": "system", "content": "three"}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer(["one two three"], vocab_size=300)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    return tokenizer


def test_rows_of_all_kinds_are_read(tmp_path):
    rows = [{"instruction": "one", "id": 7}, {"prompt": "two"}, {"messages": [USER, ASSISTANT, USER]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_questions(str(tmp_path / "rows.jsonl")) == [{"instruction": "one", "id": 7, "input": ""}, *rows[1:]]
    (tmp_path / "rows.txt").write_text("one two\r\n\n  \n three \n")
    for form in (None, PLAIN):
        assert load_questions(str(tmp_path / "rows.txt"), form) == [{"prompt": "one two"}, {"prompt": " three "}]
    for form in (CHAT, INSTRUCTION):
        lines = load_questions(str(tmp_path / "rows.txt"), form)
        assert lines == [{"instruction": text, "input": ""} for text in ("one two", " three ")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "one"}, "row 0: has no `instruction`, only input"),
        ({"prompt": ""}, "row 0: `prompt` must be a text, got ''"),
        ({"prompt": "a \udc80"}, "row 0: `prompt`: .*surrogate"),
        ({"messages": []}, "row 0: the last turn before an answer must be the user's, and there is none"),
        ({"messages": [ASSISTANT]}, "row 0: the last turn before an answer must be the user's, and there is none"),
        ({"messages": [USER, SYSTEM]}, "row 0: the last turn before an answer must be .*, and it is the system's"),
        ({"messages": ["one"]}, "row 0: `messages`, message 0 must be an object with `role` and `content`, got .*one"),
        ({"messages": [{"role": "user"}]}, "row 0: `messages`, message 0: `content` must be a string, got null"),
        ({"prompt": [3], "completion": []}, "row 0: `prompt`, message 0 must be an object"),
    ],
)
def test_a_row_that_cannot_be_asked_is_told_by_its_place(row, message, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=message):
        load_questions(str(tmp_path / "rows.json"))


def test_files_without_rows_are_told(tmp_path):
    (tmp_path / "rows.txt").write_text(" \n")
    with pytest.raises(ValueError, match="rows.txt is empty"):
        load_questions(str(tmp_path / "rows.txt"))
    with pytest.raises(FileNotFoundError, match="there is no file .*other.txt"):
        load_questions(str(tmp_path / "other.txt"))


def test_a_row_is_asked_in_the_adapters_form_and_a_prompt_verbatim(tokenizer):
    instruction = {"instruction": "one", "input": "two"}
    for form in (INSTRUCTION, CHAT, PLAIN):
        assert question(instruction, form, tokenizer) == question_ids(form, tokenizer, "one", "two")
        assert question({"prompt": "one"}, form, tokenizer) == "one"
        assert question({"messages": [USER]}, form, tokenizer) == question_ids(form, tokenizer, "one")
    assert question(instruction, None, tokenizer) == question_ids(INSTRUCTION, tokenizer, "one", "two")
    for again in ({"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}):
        assert question(again, CHAT, tokenizer) == question({"messages": [USER]}, CHAT, tokenizer)
    named = {"system": "three", "conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}
    assert tokenizer.decode(question(named, None, tokenizer)) == "<system>three<user>one<assistant>"
    talk = tokenizer.decode(question({"messages": [USER, ASSISTANT, USER]}, None, tokenizer))
    assert talk == "<user>one<assistant>two<user>one<assistant>"


def test_history_is_for_the_chat_template_alone():
    row = {"messages": [USER, ASSISTANT, USER]}
    for form in (CHAT, None):
        check_form(row, form, "here")
    for form in (INSTRUCTION, PLAIN):
        check_form({"messages": [USER, ASSISTANT]}, form, "here")
        with pytest.raises(ValueError, match="here: there are 3 turns up to .*, and the adapter, .* one question at"):
            check_form(row, form, "here")
