"""Conversations through a tokenizer's chat template, and what of them is learnt."""

import pytest

from rosa.data.conversation import check_chat_template, conversation_tokens, turn_end
from rosa.data.prompt_form import CHAT
from rosa.data.tokens import IGNORED_LABEL, tokenize
from tests.rosa.data import chat_templates
from tests.rosa.tiny_qwen2 import EOS, tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED, ANSWERED = {"role": "user", "content": "Add 2 and 3."}, {"role": "assistant", "content": "5"}
AGAIN, TWICE = {"role": "user", "content": "And that twice?"}, {"role": "assistant", "content": "10, of course"}
CONVERSATION = [SYSTEM, ASKED, ANSWERED, AGAIN, TWICE]
BOTH = pytest.mark.parametrize("template", ["WITH_MARKS", "WITHOUT_MARKS"])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(message["content"] for message in CONVERSATION)


def with_template(tokenizer, name):
    tokenizer.chat_template = getattr(chat_templates, name)
    return tokenizer


def runs_of(ids, mask):
    runs, inside = [], False
    for token, of_it in zip(ids, mask, strict=True):
        if of_it and not inside:
            runs.append([])
        if of_it:
            runs[-1].append(token)
        inside = of_it
    return runs


@BOTH
def test_the_assistants_turns_are_learnt_and_no_others(tokenizer, template):
    with_template(tokenizer, template)
    ids, mask = conversation_tokens(CONVERSATION, 0, tokenizer)
    assert ids == tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    runs = [tokenizer.decode(run) for run in runs_of(ids, mask)]
    assert runs == ["5<|endoftext|>\n", "10, of course<|endoftext|>\n"]


@BOTH
def test_of_messages_that_are_a_prompt_nothing_is_learnt(tokenizer, template):
    with_template(tokenizer, template)
    ids, mask = conversation_tokens(CONVERSATION, 3, tokenizer)
    assert [tokenizer.decode(run) for run in runs_of(ids, mask)] == ["10, of course<|endoftext|>\n"]


def test_what_comes_before_an_answer_is_what_a_generation_is_given(tokenizer):
    with_template(tokenizer, "WITHOUT_MARKS")
    ids, mask = conversation_tokens(CONVERSATION, 3, tokenizer)
    given = tokenizer.apply_chat_template(CONVERSATION[:4], add_generation_prompt=True)["input_ids"]
    assert ids[: mask.index(1)] == given


def test_a_token_of_the_template_and_of_the_answer_is_learnt_with_the_answer():
    tokenizer = tiny_tokenizer(["b"])
    tokenizer.add_tokens(["\n\n"])  # one line break is the template's, the other the answer's
    with_template(tokenizer, "WITHOUT_MARKS")
    ids, mask = conversation_tokens([ASKED, {"role": "assistant", "content": "\nb"}], 0, tokenizer)
    (run,) = runs_of(ids, mask)
    assert tokenizer.decode(run) == "\n\nb<|endoftext|>\n"


@pytest.mark.parametrize("template", ["WITH_MARKS", "WITHOUT_MARKS", "THINKING"])
def test_a_turn_ends_by_the_token_that_is_learnt_behind_its_content(template):
    tokenizer = tiny_tokenizer(["b"])
    tokenizer.add_tokens(["<think>", "<|end|>"])
    template = getattr(chat_templates, template).replace("<think></think>", "<think>").replace(EOS, "\n\n<|end|>")
    tokenizer.add_tokens(["\n\n"])  # white space ends nothing, whatever it is to the vocabulary
    tokenizer.chat_template = template
    ids, mask = conversation_tokens([ASKED, ANSWERED], 0, tokenizer)
    (run,) = runs_of(ids, mask)
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>") and turn_end(tokenizer) in run


@pytest.mark.parametrize("template", ["MUTE", "MARKS_OF_NOTHING", "WITHOUT_END", "END_NOT_LEARNT", None])
def test_a_template_that_teaches_no_end_of_a_turn_has_none(tokenizer, template):
    tokenizer.chat_template = template and getattr(chat_templates, template)
    assert turn_end(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("THINKING", CONVERSATION, r"up to message 2 otherwise than the whole.*\{% generation %\} marks"),
        ("WITHOUT_SYSTEM", CONVERSATION, "chat template refuses this conversation: there is no system role"),
        ("MUTE", CONVERSATION, "chat template leaves out what message 2 says"),
        ("MARKS_OF_NOTHING", CONVERSATION, "generation marks .* stand around nothing"),
        ("WITHOUT_MARKS", [ANSWERED], "it begins with the assistant"),
    ],
)
def test_a_template_that_does_not_tell_what_to_learn_is_refused(tokenizer, template, messages, message):
    with_template(tokenizer, template)
    with pytest.raises(ValueError, match=message):
        conversation_tokens(messages, 0, tokenizer)


def test_a_template_may_write_the_last_answer_in_its_own_way_where_there_is_one_alone(tokenizer):
    with_template(tokenizer, "THINKING")
    ids, mask = conversation_tokens([ASKED, ANSWERED], 0, tokenizer)
    assert [tokenizer.decode(run) for run in runs_of(ids, mask)] == ["<think></think>5<|endoftext|>\n"]


def test_no_chat_template_is_an_error(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template.* has none: take the chat variant"):
        check_chat_template(tokenizer)


@BOTH
def test_examples_of_conversations(tokenizer, template):
    with_template(tokenizer, template)
    rows = [{"messages": CONVERSATION, "first": 0}, {"messages": [ASKED, ANSWERED], "first": 0}]
    data = tokenize(rows, tokenizer, form=CHAT)
    whole = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in rows]
    assert data["input_ids"][:] == whole
    for example in data:
        pairs = zip(example["labels"], example["input_ids"], strict=True)
        assert all(label in (IGNORED_LABEL, token) for label, token in pairs)
    assert tokenize(rows, tokenizer, form=CHAT, train_on_prompt=True)["labels"][:] == whole
    with pytest.warns(UserWarning, match="cuts off the end of the response of 1 of 2 rows"):
        cut = tokenize(rows, tokenizer, form=CHAT, max_length=len(whole[0]) - 3)
    assert cut["input_ids"][:] == [whole[0][:-3], whole[1]]


def test_a_conversation_that_does_not_fit_is_named(tokenizer):
    with_template(tokenizer, "THINKING")
    rows = [{"messages": messages, "first": 0} for messages in ([ASKED, ANSWERED], CONVERSATION)]
    with pytest.raises(ValueError, match="row 1: the tokenizer's chat template"):
        tokenize(rows, tokenizer, form=CHAT)
    with pytest.raises(ValueError, match="a.jsonl, line 7: the tokenizer's chat template"):
        tokenize(rows, tokenizer, form=CHAT, places=["a.jsonl, line 2", "a.jsonl, line 7"])
