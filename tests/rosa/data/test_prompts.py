"""Questions as token ids, in the forms that adapters' rows have."""

import pytest

from rosa.data.prompt_form import CHAT, FORMS, INSTRUCTION, PLAIN, read_form, save_form
from rosa.data.prompts import chat_ids, prompt, question_ids
from tests.rosa.tiny_qwen2 import BOS, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One that begins a text with BOS, as its chat template does too."""
    tokenizer = tiny_tokenizer(["one two three user assistant"], vocab_size=300, template=f"{BOS} $A")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (INSTRUCTION, prompt("one", "two")),
        (PLAIN, "one\n\ntwo"),
        (CHAT, "user: one\n\ntwo\nassistant: "),
    ],
)
def test_each_form_asks_in_its_way_and_begins_with_one_bos(tokenizer, form, expected):
    ids = question_ids(form, tokenizer, "one", "two")
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == expected


def test_a_conversation_goes_by_the_template(tokenizer):
    turns = [("system", "one"), ("user", "two"), ("assistant", "three"), ("user", "two")]
    ids = chat_ids([{"role": role, "content": content} for role, content in turns], tokenizer)
    assert tokenizer.decode(ids[1:]) == "system: one\nuser: two\nassistant: three\nuser: two\nassistant: "


def test_a_template_that_is_missing_or_refuses_is_told(tokenizer):
    with pytest.raises(ValueError, match="chat template cannot be used"):
        question_ids(CHAT, tiny_tokenizer(["one"]), "one")
    strict = tiny_tokenizer(["one"])
    strict.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(ValueError, match="chat template cannot be used: no system turn"):
        chat_ids([{"role": "system", "content": "one"}], strict)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_kept_beside_the_adapter(form, tmp_path):
    assert read_form(tmp_path) == INSTRUCTION
    save_form(tmp_path, form)
    assert read_form(tmp_path) == form


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "prompt_form.json is damaged: no valid JSON"), ('{"form": "song"}', "must be one of .*got 'song'")],
)
def test_a_form_that_is_not_known_is_told(text, message, tmp_path):
    (tmp_path / "prompt_form.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_form(tmp_path)
