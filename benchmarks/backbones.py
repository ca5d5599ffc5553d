"""One decoder layer of each of the paper's three models, of transformers' own classes, with random weights.

Providers: the frozen layer with transformers' RoPE (`huggingface`) and with Liger's (`liger`), and RoSA written naively
(`eager`), that under torch.compile (`compiled`), and as this package does it (`fused`).
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, Gemma2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from benchmarks.cases import CASES, DEVICE, DTYPE, HIDDEN, Case
from benchmarks.static import frozen, rosa_fused, rosa_naive

PROVIDERS = {
    "huggingface": frozen,
    "liger": frozen,
    "eager": rosa_naive,
    "compiled": rosa_naive,
    "fused": rosa_fused,
}
# Each model's configuration class, the size of its MLP and its attention: Gemma-2 caps the scores, which sdpa cannot.
MODELS = {
    "Qwen2.5-7B": (Qwen2Config, 18944, "sdpa"),
    "Llama-3.1-8B": (LlamaConfig, 14336, "sdpa"),
    "Gemma-2-9B": (Gemma2Config, 14336, "eager"),
    "small": (Qwen2Config, 512, "sdpa"),
}
# Eager attention keeps every score, tens of gigabytes for the long sequence.
LAYER_CASES = [case for case in CASES if MODELS[case.shape.name][2] == "sdpa" or case.seq <= 2048]


def one_layer(case: Case, provider: str, patch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A model of one decoder layer of the case's shape, frozen, and what the provider adds.

    Args:
        case (Case): names the model.
        provider (str): a key of PROVIDERS.
        patch (MonkeyPatch): puts Liger's RoPE into the model's family, and takes it out again after the benchmark.
    """
    Config, intermediate_size, attention = MODELS[case.shape.name]
    config = Config(
        vocab_size=8, hidden_size=HIDDEN[case.shape.name], intermediate_size=intermediate_size, num_hidden_layers=1,
        num_attention_heads=case.shape.heads, num_key_value_heads=case.shape.key_heads, head_dim=case.shape.head_dim,
        max_position_embeddings=32768, pad_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = AutoModel.from_config(config, dtype=DTYPE).requires_grad_(False).train()
    PROVIDERS[provider](model)
    if provider == "liger":
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        patch.setattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", liger_rotary_pos_emb)
    return model


def layer_inputs(model: PreTrainedModel, case: Case) -> tuple[Tensor, dict[str, object]]:
    """Hidden states `[batch, seq, hidden_size]` that need gradients, and what else the layer is called with."""
    hidden_states = torch.randn(
        case.batch, case.seq, HIDDEN[case.shape.name], dtype=DTYPE, device=DEVICE, requires_grad=True
    )
    rotary = model.rotary_emb(hidden_states, torch.arange(case.seq, device=DEVICE)[None])
    return hidden_states, {"position_embeddings": rotary, "attention_mask": None}


def trained(module: nn.Module, hidden_states: Tensor) -> list[Tensor]:
    """What gets gradients: the input and the module's trainable parameters."""
    return [hidden_states, *(p for p in module.parameters() if p.requires_grad)]


def maybe_compiled(module: nn.Module, provider: str) -> nn.Module:
    """The module under torch.compile for the provider `compiled`, compiled anew for this shape; else itself."""
    if provider != "compiled":
        return module
    torch.compiler.reset()
    return torch.compile(module, dynamic=False)
