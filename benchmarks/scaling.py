"""What a training step costs a GPU in compute, memory and bytes on the wire, from 1 GPU to 1,024, by formulas.

    python -m benchmarks.scaling            writes the tables into docs/scaling.md
    python -m benchmarks.scaling --print    prints them

The models are built without memory from their configurations and patched, and their parameters counted. Two real
processes send, reduce and gather what `reduced` and `gathered` say (`tests/scale/test_engines.py`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

import rosa
from benchmarks.document import update_or_print
from benchmarks.presets import PRESETS
from benchmarks.results import COUNTED, read
from rosa.models.decoder import decoder_layers
from rosa.training.memory import GIB, LOGIT, state_bytes

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
GPUS = (1, 8, 64, 1024)
TOKENS, SEQ = 4096, 2048  # of a step on each GPU, and of one of its rows
K_RATIO, INTERVAL = 0.5, 40  # the paper's
MODELS = {
    "Qwen2.5-7B": PRESETS["7b"],
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "Gemma-2-9B": Gemma2Config(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, tie_word_embeddings=True,
    ),
}  # fmt: skip
MB = 1e6


class Sizes(NamedTuple):
    """A patched model in bytes, all of its decoder layers being alike."""

    layers: int
    layer: int  # of the parameters of a decoder layer, the adapter included
    besides: int  # of all other parameters
    gradients: int  # of the gradients of a layer that trains


def sizes(model: nn.Module) -> Sizes:
    """Counts a patched model; its parameters may stand on the meta device."""
    layers = decoder_layers(model)
    trained = {id(p) for p in rosa.trainable_parameters(model)}
    first = list(layers[0].module.parameters())
    layer = sum(p.nbytes for p in first)
    besides = sum(p.nbytes for p in model.parameters()) - len(layers) * layer
    return Sizes(len(layers), layer, besides, sum(p.nbytes for p in first if id(p) in trained))


def selected(layers: int, k_ratio: float = K_RATIO) -> int:
    """How many layers DLS trains between two selections."""
    return max(1, math.floor(k_ratio * layers + 1e-9))


def mean_trained(layers: int, k_ratio: float = K_RATIO, interval: int = INTERVAL) -> float:
    """Layers that compute gradients, in the mean of a step: all of them at a selection, and then those selected."""
    return (layers + (interval - 1) * selected(layers, k_ratio)) / interval


def reduced(model: Sizes, trained: float) -> float:
    """Bytes of gradients that a step reduces when this many layers train (DDP's all-reduce, FSDP2's reduce-scatter)."""
    return model.gradients * trained


def gathered(model: Sizes, lowest: int = 0) -> int:
    """Bytes of parameters that FSDP2 gathers in a step: every layer for the forward pass, and again for the backward
    pass from the last layer to one below the lowest that trains, which is fetched ahead. The rest, embeddings and head,
    stays gathered from forward to backward."""
    again = min(model.layers, model.layers - lowest + 1)
    return model.besides + model.layer * (model.layers + again)


def all_gather(payload: float, gpus: int) -> float:
    """Bytes that a GPU sends in a ring for an all-gather of `payload` bytes in all, or for a reduce-scatter of them."""
    return payload * (gpus - 1) / gpus


def all_reduce(payload: float, gpus: int) -> float:
    """Bytes that a GPU sends in a ring for an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * all_gather(payload, gpus)


def flops(model: nn.Module, seq: int, *, lowest: int = 0, trained: float | None = None) -> tuple[float, float]:
    """Floating-point operations per token of a patched model's forward and backward pass; a multiplication and an
    addition are two, elementwise operations none, attention in full and not causal.

    Backward computes the gradients of inputs from the last layer to the lowest that trains, and of weights in the
    adapters of `trained` layers (None: all).
    """
    layers, owned = decoder_layers(model), list(decoder_layers(model)[0].module.named_parameters())
    adapter = sum(p.numel() for name, p in owned if ".roae." in name)
    weights = sum(p.numel() for name, p in owned if p.ndim == 2) - adapter
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 4 * seq * config.num_attention_heads * head_dim  # Q K^T, and times V
    head = 2 * config.vocab_size * config.hidden_size
    forward = len(layers) * (2 * weights + 2 * adapter + scores) + head
    reached = len(layers) - lowest
    backward = reached * (2 * weights + 2 * adapter + 2 * scores) + head
    return forward, backward + 2 * adapter * (reached if trained is None else trained)


def memory(model: Sizes, gpus: int, saved_per_token: tuple[int, int], *, vocabulary: int, sharded: bool) -> float:
    """Bytes on a GPU, estimated: parameters; of those that train, gradients and AdamW's two moments; what
    every layer saves for backward, half of the layers trained and half frozen; the logits and their gradients (14 bytes
    a token and word); under FSDP2 two gathered layers and the embeddings and head beside the shards."""
    trained = model.layers * model.gradients
    kept = state_bytes(model.besides + model.layers * model.layer - trained, trained)
    if sharded:
        kept = kept / gpus + (2 * model.layer + model.besides) * (gpus > 1)
    activations = TOKENS * model.layers * sum(saved_per_token) / 2
    return kept + activations + LOGIT * TOKENS * vocabulary


def build(config) -> nn.Module:
    """The patched model in bfloat16, on the meta device."""
    with torch.device("meta"):
        return rosa.patch(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def models_table() -> str:
    lines = [
        "| model | trained parameters | gradients, all layers | DLS, mean of a step | all gathered once |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, config in MODELS.items():
        model = build(config)
        size = sizes(model)
        mean = reduced(size, mean_trained(size.layers))
        lines.append(
            f"| {name} | {rosa.count_parameters(model)[0]:,} | {reduced(size, size.layers) / MB:.1f} MB "
            f"| {mean / MB:.1f} MB | {(size.besides + size.layers * size.layer) / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def gpus_table() -> str:
    """Of Qwen2.5-7B, whose layers' saved bytes are counted in `benchmarks/results`."""
    config = MODELS["Qwen2.5-7B"]
    model = build(config)
    size = sizes(model)
    saved = {row["provider"]: row["saved_per_token"] for row in read(COUNTED).rows}
    saved = saved["RoSA"], saved["RoSA, frozen by DLS"]
    every, some = (reduced(size, trained) for trained in (size.layers, mean_trained(size.layers)))
    base = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    lines = [
        "| GPUs | tokens a step | DDP, all layers | DDP, DLS | FSDP2, DLS | all parameters trained, DDP "
        "| memory, DDP | memory, FSDP2 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpus in GPUS:
        fsdp2 = all_gather(gathered(size) + some, gpus)
        estimates = [memory(size, gpus, saved, vocabulary=config.vocab_size, sharded=s) / GIB for s in (False, True)]
        lines.append(
            f"| {gpus:,} | {gpus * TOKENS:,} | {all_reduce(every, gpus) / MB:.1f} MB "
            f"| {all_reduce(some, gpus) / MB:.1f} MB | {fsdp2 / 1e9:.2f} GB | {all_reduce(base, gpus) / 1e9:.2f} GB "
            f"| {estimates[0]:.1f} GiB | {estimates[1]:.1f} GiB |"
        )
    return "\n".join(lines)


def compute_table() -> str:
    """Of Qwen2.5-7B; the same on every GPU, however many there are."""
    model = build(MODELS["Qwen2.5-7B"])
    size = sizes(model)
    mean = mean_trained(size.layers)
    forward, _ = flops(model, SEQ)
    rows = [
        ("all layers train", 0, size.layers, reduced(size, size.layers)),
        ("DLS, from the lowest layer up", 0, mean, reduced(size, mean)),
        ("DLS, the upper half alone", size.layers // 2, mean, reduced(size, mean)),
    ]
    lines = [
        "| backward | TFLOP forward | TFLOP backward | FLOP per byte sent, DDP | FLOP per byte sent, FSDP2 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, lowest, trained, payload in rows:
        backward = flops(model, SEQ, lowest=lowest, trained=trained)[1]
        work = TOKENS * (forward + backward)
        ddp, fsdp2 = 2 * payload, gathered(size, lowest) + payload  # of very many GPUs
        lines.append(
            f"| {name} | {TOKENS * forward / 1e12:.1f} | {TOKENS * backward / 1e12:.1f} | {work / ddp:,.0f} "
            f"| {work / fsdp2:,.0f} |"
        )
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The document's generated parts by name."""
    return {"models": models_table(), "gpus": gpus_table(), "compute": compute_table()}


if __name__ == "__main__":
    update_or_print("scaling", __doc__, DOCUMENT, tables)
