"""The models of the training step: Qwen2.5's true configurations, and a tiny one for machines without a GPU."""

from __future__ import annotations

import torch
from transformers import Qwen2Config

QWEN = dict(max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, attn_implementation="sdpa")
PRESETS = {
    "tiny": Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    ),
    "0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, **QWEN,
    ),
    "1.5b": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True, **QWEN,
    ),
    "7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False, **QWEN,
    ),
}  # fmt: skip
NAMES = {"tiny": "tiny Qwen2", "0.5b": "Qwen2.5-0.5B", "1.5b": "Qwen2.5-1.5B", "7b": "Qwen2.5-7B"}


def default_preset(tokens: int) -> str:
    """The largest preset whose training step with any of the methods fits the card; "tiny" without a GPU."""
    if not torch.cuda.is_available():
        return "tiny"
    return largest_that_fits(tokens, torch.cuda.get_device_properties(0).total_memory)


def largest_that_fits(tokens: int, memory: float) -> str:
    """The largest preset that nine tenths of a card's memory, in bytes, hold; "0.5b" if none does."""
    return next((name for name in ("7b", "1.5b") if needed_bytes(PRESETS[name], tokens) <= 0.9 * memory), "0.5b")


def needed_bytes(config: Qwen2Config, tokens: int) -> int:
    """Bytes that a training step of `tokens` tokens is estimated to need with any of the methods.

    The weights in bfloat16; what DoRA, the greediest method, saves for backward (115 bytes a token, layer and hidden
    unit, by `python -m benchmarks.static`); the logits and what the loss makes of them (14 bytes a token and word).
    """
    d, kv = config.hidden_size, config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size
    embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    weights = 2 * (config.num_hidden_layers * layer + embeddings)
    return weights + tokens * (config.num_hidden_layers * 115 * d + 14 * config.vocab_size)
