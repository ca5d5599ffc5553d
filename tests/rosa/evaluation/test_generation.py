"""Greedy answers: right, in order, independent of the batch, and without a trace on model or tokenizer."""

import pytest
import torch
from transformers import StaticCache

from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN
from rosa.data.prompts import question_ids
from rosa.evaluation.generation import answer, stop_ids
from tests.rosa.tiny_qwen2 import TAUGHT, TURN_END, taught_to_chat, tiny_model, tiny_tokenizer

PROMPTS = ["one two three four five six seven", "one", "two one", "three three three three", "seven six five"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(PROMPTS, vocab_size=300)


@pytest.fixture
def model(tokenizer):
    # Wide weights keep the two best tokens apart, so that rounding cannot decide.
    return tiny_model(len(tokenizer), initializer_range=0.3)


def greedy(model, tokenizer, text, tokens):
    """The same by hand: one prompt, no padding, no cache, argmax."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_greedy_decoding_whatever_the_batch(model, tokenizer, batch_size):
    expected = [greedy(model, tokenizer, text, 12) for text in PROMPTS]
    assert len(set(expected)) == len(expected) and all(expected)
    assert answer(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 1.8, "num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"guidance_scale": 3.0},
        {"max_time": 1e-9},
        {"max_length": 3},
        {"exponential_decay_length_penalty": [1, 3.0]},
        {"forced_eos_token_id": 3},
        {"suppress_tokens": [*range(3, 150)]},
        {"bad_words_ids": [[token] for token in range(3, 150)]},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"stop_strings": ["o"]},
        {"prompt_lookup_num_tokens": 3},
        {"dola_layers": "low"},
    ],
    ids="-".join,
)
def test_generation_config_of_the_model_does_not_disturb_greedy_decoding(model, tokenizer, asked):
    expected = answer(model, tokenizer, PROMPTS, max_new_tokens=12)
    for name, value in asked.items():  # as they are loaded, without checks of one by another
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    assert answer(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert model.generation_config.to_dict() == before


def test_cache_that_the_generation_config_asks_for_is_kept(model, tokenizer, monkeypatch):
    caches, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: (caches.append(given["past_key_values"]), forward(**given))[1]
    )
    model.generation_config.update(cache_implementation="static", disable_compile=True)
    answer(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert {type(cache) for cache in caches} == {StaticCache}


def test_answer_ends_at_the_tokens_that_end_a_sequence(model, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    first = new.index(new[5])
    model.generation_config.eos_token_id = [new[5]]
    texts = answer(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    assert texts[0] == tokenizer.decode(new[:first]).strip()
    assert texts == answer(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=1)


@pytest.mark.parametrize("special", [True, False])
def test_answers_of_a_model_that_learnt_conversations_end_where_it_learnt_to_end_its_turn(special):
    model, tokenizer = taught_to_chat(special=special)
    asked = [question_ids(CHAT, tokenizer, text) for text, _ in TAUGHT]
    assert answer(model, tokenizer, asked, form=CHAT, max_new_tokens=12) == [said for _, said in TAUGHT]
    turn = tokenizer.convert_tokens_to_ids(TURN_END)
    assert stop_ids(model, tokenizer, CHAT) == sorted([turn, tokenizer.eos_token_id])
    for form in (PLAIN, INSTRUCTION):
        assert stop_ids(model, tokenizer, form) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizer_is_left_as_it_was(model, tokenizer, side):
    tokenizer.padding_side = side
    answer(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert tokenizer.padding_side == side


def test_tokenizer_needs_no_pad_token(model, tokenizer):
    bare = tiny_tokenizer(PROMPTS, vocab_size=300, pad=False)
    assert bare.pad_token is None
    assert answer(model, bare, PROMPTS, max_new_tokens=6) == answer(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert bare.pad_token is None


def test_training_modes_are_restored_module_by_module(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    answer(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before


def test_training_modes_are_restored_after_a_failure(model, tokenizer, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    model.train()
    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(model, tokenizer, PROMPTS)
    assert all(module.training for module in model.modules())


def test_model_still_trains_after_answering(model, tokenizer):
    answer(model, tokenizer, PROMPTS, max_new_tokens=2)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_prompts_no_answers(model, tokenizer):
    assert answer(model, tokenizer, []) == []


def test_one_string_is_not_a_list_of_prompts(model, tokenizer):
    with pytest.raises(TypeError, match="sequence of strings, got one string"):
        answer(model, tokenizer, "one")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["one", ""], {}, "prompt 1 holds no token"),
        (["one", "two \udc80"], {}, r"prompt 1: character 4 is '\\udc80', half of a surrogate pair, and no text"),
        (["one"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (["one"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        answer(model, tokenizer, prompts, **options)
