"""The forms of rows: how they are found out, what a checked row is, and what is said of those that do not fit."""

import pytest

from rosa.data.forms import DATA_FORMS, check_row, find_form

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = {"messages": [USER, ASSISTANT], "first": 0}


def checked(row, name=None):
    form = find_form(row, "a.jsonl, line 3", name)
    return form, check_row(form, row, "a.jsonl, line 3")


@pytest.mark.parametrize(
    ("row", "name", "prompts", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, "conversations", "chat", MESSAGES),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            "conversations", "chat", MESSAGES,
        ),
        ({"conversations": [USER, ASSISTANT], "text": "hi, hello"}, "conversations", "chat", MESSAGES),
        ({"messages": [USER, ASSISTANT, USER], "prompt": "hi"}, "conversations", "chat", MESSAGES),
        (
            {"conversations": [USER, ASSISTANT], "system": "Be brief."},
            "conversations", "chat", {"messages": [SYSTEM, USER, ASSISTANT], "first": 0},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("h", "i")]}, ASSISTANT]},
            "conversations", "chat", MESSAGES,
        ),
        ({"prompt": "a", "completion": " b"}, "prompt_completion", "plain", {"prompt": "a", "completion": " b"}),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            "prompt_completion", "chat", {"messages": [USER, ASSISTANT, USER, ASSISTANT], "first": 3},
        ),
        ({"text": "a b"}, "text", "plain", {"prompt": "", "completion": "a b"}),
        (
            {"instruction": "a", "output": "b", "text": "a b"},
            "instruction", "instruction", {"instruction": "a", "output": "b", "text": "a b", "input": ""},
        ),
    ],
)  # fmt: skip
def test_the_form_is_found_out_by_the_columns(row, name, prompts, expected):
    form, made = checked(row)
    assert (form.name, form.prompts, made) == (name, prompts, expected)


def test_a_form_that_is_asked_for_counts_more_than_the_columns():
    row = {"instruction": "a", "output": "b", "text": "a b", "messages": [USER, ASSISTANT]}
    assert [checked(row, name)[0].name for name in ("instruction", "text", "conversations")] == [
        "instruction", "text", "conversations",
    ]  # fmt: skip
    assert "prompt_completion" in DATA_FORMS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [], "instruction": ""}, "may be read as conversations or as instruction: say .* --data_format"),
        ({"prompt": "", "completion": "", "instruction": ""}, "may be read as prompt_completion or as instruction"),
        ({"question": "", "answer": ""}, "must have `messages` or .*, or `text`, got only question, answer"),
        ({}, "must have .*, got only nothing"),
        (["hi"], r'must have .*, got a list \["hi"\]'),
    ],
)
def test_columns_that_tell_no_form_are_an_error(row, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{message}"):
        checked(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, '`messages` must be a list of messages, got a string "hi"'),
        ({"messages": []}, "`messages` has no message of the assistant"),
        ({"messages": [USER]}, "`messages` has no message of the assistant"),
        ({"messages": ["hi"]}, "`messages`, message 0 must be an object with `role` and `content`, got a string"),
        ({"messages": [USER, {"role": "bot", "content": ""}]}, "message 1: `role` must be one of system.*, got .*bot"),
        ({"messages": [USER, {"content": "hello"}]}, "message 1: `role` must be one of .*, got null"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 1: `content` must be a string, got null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
            "`messages`, message 0: `content`, part 1 must be of type text, got type image",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "`content`, part 0 must be of type text, got a string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "part 0: `text` must be a string, got null"),
        ({"messages": [{"role": "user", "content": []}]}, "message 0: `content` must be a string, got a list"),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]},
            "message 1 has `tool_calls`, and calls of",
        ),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "has `tools`"),
        ({"messages": [USER, ASSISTANT], "system": 3}, "`system` must be a string, got a number 3"),
        ({"conversations": [{"from": "alien", "value": ""}]}, "message 0: `from` must be one of system, .*alien"),
        ({"prompt": "a", "completion": 3}, "`completion` must be a string, got a number 3"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "`completion` must be a string, got a list"),
        ({"prompt": [USER], "completion": "a"}, "`completion` must be a list of messages, got a string"),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "`completion` has no message of the assistant"),
        ({"prompt": "", "completion": ""}, "`prompt` and `completion` are empty"),
        ({"text": ""}, "`text` is empty"),
        ({"text": None}, "`text` must be a string, got null"),
        ({"text": "\udc80"}, "`text` holds half a surrogate pair at character 0"),
    ],
)
def test_a_row_that_does_not_fit_its_form_is_named(row, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{message}"):
        checked(row)


@pytest.mark.parametrize("row", [{"messages": [USER, ASSISTANT]}, 3])
def test_a_row_of_another_form_than_the_first_is_named(row):
    with pytest.raises(ValueError, match=r"line 3: (has no `text`, only messages|must be an object, got a number 3)"):
        check_row(find_form({"text": "a"}, ""), row, "line 3")
