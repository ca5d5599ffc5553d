"""Which decoder layers an adapter is for."""

from __future__ import annotations

from torch import nn

from rosa.models.decoder import DecoderLayer, decoder_layers


def chosen_layers(model: nn.Module, chosen: tuple[int, ...] | None, able: list[DecoderLayer], what: str) -> set[str]:
    """The names of the decoder layers that a configuration chooses.

    Args:
        model (nn.Module): any model with decoder layers.
        chosen (tuple of int or None): the configuration's `layers`; None for all.
        able (list of DecoderLayer): those that can be adapted.
        what (str): what they have, in words.

    Raises:
        ValueError: a layer does not exist, or cannot be adapted.
    """
    able_names = {layer.name for layer in able}
    if chosen is None:
        return able_names
    layers = [layer.name for layer in decoder_layers(model)]
    if chosen[-1] >= len(layers):
        raise ValueError(f"layers names layer {chosen[-1]}, but {type(model).__name__} has {len(layers)} (from 0)")
    without = [i for i in chosen if layers[i] not in able_names]
    if without:
        raise ValueError(f"layers names {without}, which have no {what} in {type(model).__name__}")
    return {layers[i] for i in chosen}
