"""Tiny models of the families that RoSA supports, made from their configurations."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

import rosa

FAMILIES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "mistral": MistralConfig,
}
CONFIGS = FAMILIES | {"gemma3": Gemma3TextConfig}  # what make_model makes, beyond the families that each test runs on


def make_model(family="qwen2", *, dtype=torch.float32, seed=0, **changes):
    """A model of 4 layers with 4 query heads and 2 key heads of 16."""
    sizes = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    set_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family](**sizes | changes)).to(dtype)


def stir(model):
    """Gives W_up and the norms values, as training would, so that RoAE has an effect."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("roae.up"):
            nn.init.normal_(parameter, generator=generator)
        elif "norm" in name and parameter.requires_grad:
            with torch.no_grad():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_patched(family="qwen2", *, config=None, **options):
    config = rosa.RosaConfig(rank=4) if config is None else config
    return stir(rosa.patch(make_model(family, **options), config))


@pytest.fixture(scope="module")
def reference_backend():
    """Triton's interpreter would take most of the time, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSA_BACKEND", "reference")
        yield


@pytest.fixture(name="make_model")
def _make_model():
    return make_model


@pytest.fixture(name="make_patched")
def _make_patched():
    return make_patched


@pytest.fixture(name="stir")
def _stir():
    return stir


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def batch():
    """Two rows of tokens with labels, the second one padded on the left."""
    ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
