"""Attention back ends: eager, sdpa, flex_attention and FlashAttention compute the same with RoSA and train it alike."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# Wide weights make RoAE's part in the output large; the sliding window, where there is one, is short.
SHAPE = dict(num_hidden_layers=2, initializer_range=0.3)


@pytest.fixture
def model(family, make_patched):
    return make_patched(family, **SHAPE).train()


@pytest.fixture
def text(batch):
    """The padded batch, without the label that the last padding token would have to predict: what attends to nothing
    differs between back ends."""
    return batch | {"labels": batch["labels"].index_fill(1, torch.tensor([4]), -100)}


def run(model, text, implementation):
    """The logits of the real tokens and the gradients of all that RoSA trains."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad()
    output = model(**text)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    return output.logits[text["attention_mask"].bool()], gradients


def farthest(model, text, implementation):
    """How far the back end is from eager attention: the logits, or the gradient that is farthest."""
    (logits, gradients), (eager, expected) = run(model, text, implementation), run(model, text, "eager")
    return max(distance(logits, eager), *(distance(gradients[name], expected[name]) for name in expected))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"], indirect=True)  # Gemma2 has no sdpa
def test_sdpa_trains_as_eager_does(model, text):
    assert farthest(model, text, "sdpa") < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "gemma2"], indirect=True)
def test_flex_attention_computes_what_eager_does(model, text):
    inputs, logits = {name: text[name] for name in ("input_ids", "attention_mask")}, []
    for implementation in ("flex_attention", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(**inputs).logits[inputs["attention_mask"].bool()])
    assert distance(*logits) < 1e-5


@pytest.mark.gpu  # torch's flex_attention has no backward on a CPU
def test_flex_attention_trains_as_eager_does(model, text):
    assert farthest(model.to("cuda"), {name: value.to("cuda") for name, value in text.items()}, "flex_attention") < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash_attn is not installed")
def test_flash_attention_trains_as_eager_does(family, make_patched, text):
    model = make_patched(family, dtype=torch.bfloat16, **SHAPE).train().to("cuda")
    assert farthest(model, {name: value.to("cuda") for name, value in text.items()}, "flash_attention_2") < 0.05
