"""A conversation: what is asked, what is remembered, and how an answer comes."""

import pytest

from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN
from rosa.evaluation.conversation import Conversation
from rosa.evaluation.generation import answer
from tests.rosa.tiny_qwen2 import TAUGHT, taught_to_chat, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer(["one two three"], vocab_size=300)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    return tokenizer


@pytest.fixture
def model(tokenizer):
    return tiny_model(len(tokenizer), initializer_range=0.3)


class Asked:
    """Keeps what a model's `generate` was given."""

    def __init__(self, model, monkeypatch):
        self.given, generate = [], model.generate
        monkeypatch.setattr(model, "generate", lambda **options: (self.given.append(options), generate(**options))[1])

    def texts(self, tokenizer):
        return [tokenizer.decode(options["input_ids"][0]) for options in self.given]


def said(ask, *question):
    pieces = []
    ask(*question, pieces.append)
    return "".join(pieces)


def test_an_answer_is_that_of_greedy_decoding(model, tokenizer):
    conversation = Conversation(model, tokenizer, form=PLAIN, max_new_tokens=12)
    assert said(conversation.ask, "one two") == answer(model, tokenizer, ["one two"], max_new_tokens=12)[0]


def test_the_chat_template_is_given_the_turns_so_far(model, tokenizer, monkeypatch):
    asked = Asked(model, monkeypatch)
    conversation = Conversation(model, tokenizer, form=CHAT, system="three", max_new_tokens=4)
    first = said(conversation.ask, "one")
    said(conversation.ask, "two")
    again = said(conversation.ask_again)
    conversation.reset()
    said(conversation.ask, "two")
    start = "<system>three<user>"
    turns = f"{start}one<assistant>{first}<user>two<assistant>"
    assert asked.texts(tokenizer) == [f"{start}one<assistant>", turns, turns, f"{start}two<assistant>"]
    assert first and again


@pytest.mark.parametrize("special", [True, False])
def test_an_answer_ends_where_the_assistants_turn_was_learnt_to_end(special):
    conversation = Conversation(*taught_to_chat(special=special), form=CHAT, max_new_tokens=12)
    for asked, expected in TAUGHT:
        conversation.reset()
        assert said(conversation.ask, asked) == expected
    conversation.form = PLAIN  # as of another adapter; the question was asked by the chat template
    assert said(conversation.ask_again) == expected


@pytest.mark.parametrize("form", [INSTRUCTION, PLAIN])
def test_other_forms_have_no_history(model, tokenizer, monkeypatch, form):
    asked = Asked(model, monkeypatch)
    conversation = Conversation(model, tokenizer, form=form, max_new_tokens=4)
    for _ in range(2):
        said(conversation.ask, "one")
    assert len({*asked.texts(tokenizer)}) == 1


def test_an_answer_can_be_stopped_and_what_there_is_of_it_is_remembered(model, tokenizer, monkeypatch):
    asked = Asked(model, monkeypatch)
    conversation = Conversation(model, tokenizer, form=CHAT, max_new_tokens=200)
    pieces, tokens = [], []
    conversation.ask("one", pieces.append, lambda: tokens.append(0) or len(tokens) == 5)
    assert len(tokens) == 5
    said(conversation.ask, "two")
    assert f"<user>one<assistant>{''.join(pieces)}<user>two" in asked.texts(tokenizer)[1]


def test_sampling_is_as_it_is_asked_for(model, tokenizer, monkeypatch):
    asked = Asked(model, monkeypatch)
    for temperature in (None, 0, 0.7):
        said(Conversation(model, tokenizer, form=PLAIN, max_new_tokens=2, temperature=temperature).ask, "one")
    assert [options.get("do_sample") for options in asked.given] == [None, False, True]
    assert asked.given[2]["temperature"] == 0.7


def test_a_temperature_of_0_is_greedy_whatever_the_generation_config_asks_for(model, tokenizer):
    expected = answer(model, tokenizer, ["one two"], max_new_tokens=12)[0]
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.8, no_repeat_ngram_size=1)
    assert said(Conversation(model, tokenizer, form=PLAIN, max_new_tokens=12, temperature=0).ask, "one two") == expected


def test_what_a_generation_config_asks_for_and_cannot_be_streamed_does_not_stop_a_conversation(model, tokenizer):
    expected = answer(model, tokenizer, ["one two"], max_new_tokens=12)[0]
    model.generation_config.update(do_sample=False, num_beams=3, num_return_sequences=2, stop_strings=["no such text"])
    assert said(Conversation(model, tokenizer, form=PLAIN, max_new_tokens=12).ask, "one two") == expected


def test_white_space_around_an_answer_is_not_said(model, tokenizer, monkeypatch):
    def generate(streamer, **_):
        for piece in (" \n", " one ", "two \n", "\n three", " \n", " "):
            streamer.on_finalized_text(piece)

    monkeypatch.setattr(model, "generate", generate)
    assert said(Conversation(model, tokenizer, form=PLAIN).ask, "one") == "one two \n\n three"


def test_what_cannot_be_asked_is_told_and_changes_nothing(model, tokenizer):
    conversation = Conversation(model, tokenizer, form=CHAT, max_new_tokens=2)
    with pytest.raises(ValueError, match="nothing was asked yet"):
        conversation.ask_again(print)
    with pytest.raises(ValueError, match="surrogate"):
        conversation.ask("a \udc80", print)
    said(conversation.ask, "one")
    before = [*conversation._turns]
    with pytest.raises(ValueError, match=r"with its \d+ tokens this is longer than the model's 1024 positions"):
        conversation.ask("one two " * 1024, print)
    assert conversation._turns == before and len(before) == 2
