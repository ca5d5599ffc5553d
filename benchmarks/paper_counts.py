"""How many parameters the paper's methods train on the paper's models: counted on the true configurations.

The models are built without memory, and `rosa.training.methods.attach` makes them trainable as `rosa train` does.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, Qwen2Config, Qwen3Config

from benchmarks import scaling
from benchmarks.presets import PRESETS, QWEN
from rosa.models.decoder import decoder_layers
from rosa.storage.settings import as_arguments, load_settings
from rosa.training.finetune_arguments import FinetuneArguments
from rosa.training.methods import attach, trainable
from rosa.training.parsing import parse

WRITTEN = ", as written"  # behind the name of a method that the paper's text sets otherwise than its tables
CONFIGS = Path(__file__).parent.parent / "configs" / "paper"
MODELS = {
    **scaling.MODELS,
    "Qwen2.5-0.5B": PRESETS["0.5b"],
    "Qwen2.5-1.5B": PRESETS["1.5b"],
    "Qwen2.5-3B": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True, **QWEN,
    ),
}  # fmt: skip
LARGER = {  # for quantized bases
    "Qwen2.5-14B": Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=False, **QWEN,
    ),
}  # fmt: skip
ALL = MODELS | LARGER
NEWER = {  # the models of DyPAM's tables
    "Llama-3.2-3B": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "Qwen3-8B": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "Gemma-3-4B": Gemma3Config(
        text_config=dict(
            vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, tie_word_embeddings=True,
        ),
        vision_config=dict(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=896,
            patch_size=14, vision_use_head=False,
        ),
    ),
}  # fmt: skip


@functools.cache
def methods() -> dict[str, FinetuneArguments]:
    """The methods and the ablations of `configs/paper` by name, as `rosa train` would take them: as printed, and where
    the paper's text has another setting, as written too."""
    printed, written = (load_settings(CONFIGS / f"{name}.yaml") for name in ("methods", "methods_as_written"))
    listed = printed | {f"{name}{WRITTEN}": written[name] for name in printed if written[name] != printed[name]}
    listed |= load_settings(CONFIGS / "table4_ablations.yaml")["methods"]
    needed = {"model": "model", "data": "data", "output": "output"}
    return {name: parse(as_arguments(needed | options))[0] for name, options in listed.items()}


class Sizes(NamedTuple):
    """A model with a method: numbers of parameters, and bytes."""

    trained: int
    total: int  # the adapter included
    frozen_bytes: int
    trained_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        parameters = list(model.parameters())
        trained = sum(p.nbytes for p in parameters if p.requires_grad)
        return cls(*trainable(model), sum(p.nbytes for p in parameters) - trained, trained)


def build(name: str, job: FinetuneArguments, layers: int) -> nn.Module:
    """The first decoder layers of a model in bfloat16, its embeddings and head, on the meta device, with a method."""
    config = type(ALL[name])(**ALL[name].to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # BOFT reads from tables that it makes, and so these must have values.
    with nullcontext() if job.method == "boft" else torch.device("meta"):
        return attach(model, job.method, config=job.config, settings=job.peft_settings)


@functools.cache
def sizes(name: str, method: str) -> Sizes:
    """Counts a model with a method of `methods()`. All layers are alike: the second is taken for all that follow."""
    one, two = (Sizes.of(build(name, methods()[method], layers)) for layers in (1, 2))
    return Sizes(*(a + (ALL[name].num_hidden_layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def linears(name: str) -> int:
    """Weights of the linear layers of a model's decoder."""
    layer = decoder_layers(build(name, methods()["LoRA"], layers=1))[0].module
    return ALL[name].num_hidden_layers * sum(
        p.numel() for p in layer.parameters() if p.ndim == 2 and not p.requires_grad
    )


@functools.cache
def newer(name: str) -> tuple[int, int]:
    """Trained parameters and all of a model of NEWER with RoSA; Gemma 3 with its part for pictures."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(NEWER[name], dtype=torch.bfloat16)
        return trainable(attach(model, "rosa"))


def boft(name: str, factors: int) -> tuple[int, int]:
    """Trained parameters and all of BOFT with some butterfly factors, each of as many parameters as the first.

    peft makes one factor, unless it can compile its CUDA extension.
    """
    model = build(name, methods()["BOFT"], layers=1)
    owned = {key: p for key, p in model.named_parameters() if p.requires_grad}
    blocks = sum(p.numel() // len(p) for key, p in owned.items() if "boft_R" in key)
    scales = sum(p.numel() for key, p in owned.items() if "boft_s" in key)
    found = sizes(name, "BOFT")
    number = MODELS[name].num_hidden_layers * (factors * blocks + scales)
    return number, found.total - found.trained + number
