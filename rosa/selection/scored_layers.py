"""Which layers take part in Dynamic Layer Selection, and their scores (Eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from rosa.adapters.parameters import trainable_parameters
from rosa.errors import UnsupportedModelError
from rosa.models.decoder import DecoderLayer, decoder_layers
from rosa.selection.engines import Engine

# By the gradients of the norms before attention and the MLP, or by those of all else that trains in the layer.
SCORES = ("norms", "adapter")


class ScoredLayer(NamedTuple):
    """A decoder layer that takes part in layer selection, by its index in the model."""

    index: int
    parameters: list[nn.Parameter]  # those that the optimizer holds; what layers share, each of them has
    scored: list[nn.Parameter]  # those whose gradients are the layer's score
    score_only: list[nn.Parameter]  # norm weights that nobody trains, and get gradients for the score alone

    @property
    def elsewhere(self) -> list[nn.Parameter]:
        """Norm weights that are not in the optimizer but require gradients: another one trains them."""
        return [p for p in self.scored if not is_among(p, self.parameters) and not is_among(p, self.score_only)]


def scored_layers(
    optimizer: torch.optim.Optimizer, model: nn.Module, score: str, before: Sequence[ScoredLayer] = ()
) -> list[ScoredLayer]:
    """The decoder layers of which the optimizer holds parameters, in order.

    Args:
        optimizer (Optimizer): built from parameters of the model.
        model (nn.Module): any model with decoder layers.
        score (str): one of SCORES.
        before (sequence of ScoredLayer): what an earlier call found. These layers alone take part again, and no norm
            that served the score alone is taken for another optimizer's, whatever it requires meanwhile.

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
    known = {layer.index: layer for layer in before}
    layers = []
    for index, layer in enumerate(decoder_layers(model)):
        parameters = [p for p in layer.module.parameters() if id(p) in held]
        if parameters and (index in known or not known):
            scored = _norm_weights(layer) if score == "norms" else _without_norms(parameters, layer)
            idle = [p for p, idle in zip(scored, _idle(scored, known.get(index)), strict=False) if idle]
            layers.append(ScoredLayer(index, parameters, scored, [p for p in idle if not is_among(p, parameters)]))
    if not layers:
        raise ValueError(
            "the optimizer holds no parameter of the model's decoder layers, so freezing them would have no effect; "
            "build it from this model's parameters, for example rosa.trainable_parameters(model)"
        )
    return layers


def score_layers(layers: Sequence[ScoredLayer], engine: Engine, score: str, step: int) -> tuple[float, ...]:
    """Eq. 5: sqrt(|grad attn norm|^2 + |grad ffn norm|^2) of every layer, or the same over its adapter; a layer that
    took no part scores 0.

    Args:
        layers (sequence of ScoredLayer): what `scored_layers` found.
        engine (Engine): that reduces their gradients.
        score (str): one of SCORES.
        step (int): for the errors.

    Raises:
        RuntimeError: none of the scored parameters has a gradient.
        FloatingPointError: a score is not finite.
    """
    if not engine.saw_backward([p for layer in layers for p in layer.scored]):
        scored = score.removesuffix("s")
        raise RuntimeError(
            f"step {step} selects layers, but no {scored} has a gradient: call backward() before step(), and "
            "another optimizer's zero_grad() after it"
        )
    engine.reduce_unmanaged([p for layer in layers for p in layer.score_only])
    squares, device = [], layers[0].scored[0].device
    for layer in layers:
        parts = [norm.to(device) for norm in map(engine.squared_norm, layer.scored) if norm is not None]
        squares.append(sum(parts, torch.zeros((), device=device)))
    scores = tuple(torch.stack(squares).sqrt().tolist())
    for layer, value in zip(layers, scores, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the gradients of layer {layer.index}'s {score} are not finite at step {step}{_remedy(layer)}"
            )
    return scores


def holders(layers: Iterable[ScoredLayer]) -> dict[nn.Parameter, set[int]]:
    """The indices of the layers that have each of the parameters: more than one where layers share a module."""
    found: dict[nn.Parameter, set[int]] = {}
    for layer in layers:
        for parameter in layer.parameters:
            found.setdefault(parameter, set()).add(layer.index)
    return found


def is_among(parameter: nn.Parameter, parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter is p for p in parameters)


def _idle(scored: list[nn.Parameter], before: ScoredLayer | None) -> list[bool]:
    """Which of the scored parameters nobody trains. FSDP2 may have put others in their place, in the same order."""
    if before is None:
        return [not p.requires_grad for p in scored]
    return [is_among(p, before.score_only) for p in before.scored]


def _remedy(layer: ScoredLayer) -> str:
    """What to do where a GradScaler's scale may be all that is too large: it does not see norms that nobody trains."""
    if not any(p.dtype == torch.float16 for p in layer.score_only):
        return ""
    return (
        ": these norms are in float16 and nobody trains them, so that no GradScaler lowers its scale for them. Use "
        "score='adapter', or train them in float32 (train_norms=True), or load the model in bfloat16 or float32"
    )


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
