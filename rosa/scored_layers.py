"""Which layers take part in Dynamic Layer Selection, and whose gradients score them (Eq. 5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from rosa.decoder import DecoderLayer, decoder_layers
from rosa.errors import UnsupportedModelError
from rosa.patching import trainable_parameters

# By the gradients of the norms before attention and the MLP, or by those of all else that trains in the layer.
SCORES = ("norms", "adapter")


class ScoredLayer(NamedTuple):
    """A decoder layer that takes part in layer selection, by its index in the model."""

    index: int
    parameters: list[nn.Parameter]  # those that the optimizer holds
    scored: list[nn.Parameter]  # those whose gradients are the layer's score

    @property
    def score_only(self) -> list[nn.Parameter]:
        """Norm weights that are not trained, and get gradients for the score alone."""
        return [weight for weight in self.scored if not any(weight is p for p in self.parameters)]


def scored_layers(optimizer: torch.optim.Optimizer, model: nn.Module, score: str) -> list[ScoredLayer]:
    """The decoder layers of which the optimizer holds parameters, in order.

    Args:
        optimizer (Optimizer): built from parameters of the model.
        model (nn.Module): any model with decoder layers.
        score (str): one of SCORES.

    Raises:
        ValueError: the optimizer holds no parameter of the layers, or with "adapter" none but norms.
        UnsupportedModelError: no decoder layers, norms without weights, or a model sharded by FSDP1.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            "FullyShardedDataParallel (FSDP1) flattens parameters, so layers cannot be told apart; shard the model "
            "with torch.distributed.fsdp.fully_shard (FSDP2; in Accelerate `fsdp_version: 2`)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held &= {id(p) for p in trainable_parameters(model)}  # an optimizer may hold a frozen base too
    layers = []
    for index, layer in enumerate(decoder_layers(model)):
        parameters = [p for p in layer.module.parameters() if id(p) in held]
        if parameters:
            scored = _norm_weights(layer) if score == "norms" else _without_norms(parameters, layer)
            layers.append(ScoredLayer(index, parameters, scored))
    if not layers:
        raise ValueError(
            "the optimizer holds no parameter of the model's decoder layers, so freezing them would have no effect; "
            "build it from this model's parameters, for example rosa.trainable_parameters(model)"
        )
    return layers


def _norm_weights(layer: DecoderLayer) -> list[nn.Parameter]:
    weights = [getattr(norm, "weight", None) for norm in layer.scored_norms]
    if not weights or any(weight is None for weight in weights):
        raise UnsupportedModelError(
            f"{layer.name} ({type(layer.module).__name__}) has {'norms without weights' if weights else 'no norms'}: "
            "there is nothing to rank layers by with score='norms'; score='adapter' ranks them by the gradients of "
            "their adapters"
        )
    return weights


def _without_norms(parameters: list[nn.Parameter], layer: DecoderLayer) -> list[nn.Parameter]:
    norms = {id(p) for norm in layer.norms.values() for p in norm.parameters()}
    adapter = [p for p in parameters if id(p) not in norms]
    if not adapter:
        raise ValueError(f"the optimizer holds nothing of {layer.name} but its norms: score='adapter' has no adapter")
    return adapter
