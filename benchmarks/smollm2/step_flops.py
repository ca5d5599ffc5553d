"""Floating-point operations of a training step, by formula, from a patched model's matrix products.

A multiplication and an addition are two operations, elementwise ones none. Attention is counted in full, not causal,
and as four products backward: nothing is computed twice. Of the base the weights get no gradients.

A layer that trains costs its products forward, those for the gradients of its inputs, and those of its adapter's
weights; a layer that backward passes through costs the first two; one below the lowest that trains, the first alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from rosa.models.decoder import decoder_layers


class Batch(NamedTuple):
    """What a step's operations depend on: its rows, their length with padding, and how many tokens have a label."""

    rows: int
    length: int
    labelled: int


TYPICAL = Batch(rows=4, length=200, labelled=320)  # about what a step of configs/smollm2/train_arithmetic.yaml sees


class StepFlops(NamedTuple):
    """The products of a patched model: multiplications a token, by layer, lowest first."""

    linears: tuple[int, ...]  # of the base
    adapters: tuple[int, ...]
    attention: int  # width of a layer's query heads
    head: int  # of the output layer, which runs where a label is to be predicted alone

    def forward(self, batch: Batch) -> int:
        """Operations of a forward pass."""
        return 2 * self.head * _predicted(batch) + sum(self._through(i, batch) for i in range(len(self.linears)))

    def backward(self, batch: Batch, trained: Sequence[int]) -> int:
        """Operations of a backward pass.

        Args:
            batch (Batch): the step's.
            trained (sequence of int): the layers whose parameters get gradients.
        """
        tokens = batch.rows * batch.length
        passed = sum(self._through(i, batch, products=2) for i in range(min(trained), len(self.linears)))
        weights = sum(2 * tokens * self.adapters[i] for i in trained)
        return 2 * self.head * _predicted(batch) + passed + weights

    def costs(self, batch: Batch) -> list[int]:
        """What backward costs down to each layer, if that one alone trains."""
        return [self.backward(batch, [i]) for i in range(len(self.linears))]

    def _through(self, layer: int, batch: Batch, products: int = 1) -> int:
        """A layer forward; or backward to its inputs, where each of attention's two products becomes two."""
        linear = self.linears[layer] + self.adapters[layer]
        return 2 * batch.rows * batch.length * (linear + products * 2 * batch.length * self.attention)


def step_flops(model: nn.Module) -> StepFlops:
    """The products of a model that `rosa.patch` has patched with RoSA."""
    linears, adapters = [], []
    for layer in decoder_layers(model):
        weights = {name: p for name, p in layer.module.named_parameters() if p.ndim == 2}
        added = sum(p.numel() for name, p in weights.items() if ".roae." in name)
        adapters.append(added)
        linears.append(sum(p.numel() for p in weights.values()) - added)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return StepFlops(
        tuple(linears), tuple(adapters), config.num_attention_heads * head_dim, config.vocab_size * config.hidden_size
    )


def layers_that_train(model: nn.Module) -> list[int]:
    """The decoder layers of which something requires gradients now."""
    layers = enumerate(decoder_layers(model))
    return [i for i, layer in layers if any(p.requires_grad for p in layer.module.parameters())]


def _predicted(batch: Batch) -> int:
    return batch.labelled + 1  # `response_logits` adds a position that predicts nothing
