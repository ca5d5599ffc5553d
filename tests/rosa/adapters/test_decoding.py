"""`generate` with a patched model, every cache and every way to decode: the tokens are those of decoding by hand,
without a cache, one text at a time."""

import pytest
import torch

import rosa

NEW = 10
CONFIG = rosa.RosaConfig(rank=4, r_low=1.0, alpha=1.0)  # strong enough to change what is generated


FAMILIES = {
    # Wide weights keep the two best tokens apart, so that rounding cannot decide. Gemma's embeddings, which enter
    # scaled and are its output weights too, would at this width only repeat the last token.
    "llama": dict(initializer_range=0.3),
    "qwen3": dict(initializer_range=0.3),
    "mistral": dict(initializer_range=0.3, sliding_window=6),  # shorter than the texts
    "gemma2": dict(initializer_range=0.1, sliding_window=6),
    "gemma3": dict(initializer_range=0.1, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.fixture(params=FAMILIES)
def make(request, make_model):
    return lambda: make_model(request.param, num_hidden_layers=2, **FAMILIES[request.param]).eval()


@pytest.fixture
def model(make, stir):
    return stir(rosa.patch(make(), CONFIG)).eval()


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (length,), generator=generator) for length in (13, 5, 9)]


@pytest.fixture
def padded(texts):
    ids, mask = torch.zeros(2, 3, 13, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 13 - len(text) :], mask[row, 13 - len(text) :] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(model, texts):
    rows = []
    for text in texts:
        ids = text[None]
        with torch.no_grad():
            for _ in range(NEW):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        rows.append(ids[0, len(text) :])
    return torch.stack(rows)


def generate(model, inputs, **options):
    start = inputs["input_ids"].shape[1]
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(**inputs, **options)[:, start:]


CACHES = ["dynamic", "static", "sliding_window", "hybrid"]


@pytest.mark.parametrize("cache", CACHES)
def test_caches_and_left_padding(make, model, texts, padded, cache):
    expected = by_hand(model, texts)
    assert not torch.equal(expected, by_hand(make(), texts))  # the adapter has its part in it
    assert torch.equal(generate(model, padded, cache_implementation=cache), expected)


@pytest.mark.gpu  # where generate compiles the model for a static cache, and where caches are offloaded to the CPU
@pytest.mark.parametrize("cache", [*CACHES, "offloaded", "offloaded_static"])
def test_caches_and_left_padding_on_a_gpu(model, texts, padded, cache):
    model.to("cuda")
    texts, padded = [text.to("cuda") for text in texts], {name: value.to("cuda") for name, value in padded.items()}
    assert torch.equal(generate(model, padded, cache_implementation=cache), by_hand(model, texts))


def test_prefill_in_chunks(model, texts):
    assert torch.equal(generate(model, {"input_ids": texts[0][None]}, prefill_chunk_size=4), by_hand(model, texts[:1]))


def test_beams(model, padded):
    found = generate(model, padded, num_beams=3, num_return_sequences=2)
    assert torch.equal(found, generate(model, padded, num_beams=3, num_return_sequences=2, use_cache=False))
    assert not torch.equal(found[::2], generate(model, padded))


@pytest.mark.parametrize("assistant", ["the base", "the patched model", "the prompt", "the lower layer"])
def test_assisted_decoding(make, model, texts, assistant):
    options = {
        "the base": dict(assistant_model=make()),
        "the patched model": dict(assistant_model=model),
        "the prompt": dict(prompt_lookup_num_tokens=3),
        "the lower layer": dict(assistant_early_exit=1),
    }[assistant]
    assert torch.equal(generate(model, {"input_ids": texts[0][None]}, **options), by_hand(model, texts[:1]))


def test_a_patched_assistant_of_a_base(make, model, texts):
    base = make()
    assert torch.equal(generate(base, {"input_ids": texts[0][None]}, assistant_model=model), by_hand(base, texts[:1]))
