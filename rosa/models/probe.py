"""Finds out how an attention module rotates queries and keys: by running a blank twin of it on the meta device.

The twin's rotary functions are watched: which one is called, and with what shapes. That one is then fed random heads
and compared with RoPE in every known layout. Nothing is read off the family's name.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rosa.errors import UnsupportedModelError
from rosa.models.decoder import DecoderLayer, decoder_layers, rotary_functions
from rosa.models.layouts import find_layout
from rosa.models.rotary import RotaryLayout
from rosa.models.twin import TOKENS, described, source, watch


class RotaryShape(NamedTuple):
    """What an attention module hands to its rotary function.

    `hidden_size` is the width of the module's input, `head_dim` that of what is rotated: a head, or a part of it.
    `key_heads` is 0 where the module rotates queries alone, and takes its keys from an earlier layer. `query` and `key`
    are the names within it of the linear layers whose outputs, head by head, are its queries and keys as they are
    rotated; None where there is more between, such as a norm.
    """

    hidden_size: int
    heads: int
    key_heads: int
    head_dim: int
    layout: RotaryLayout
    query: str | None
    key: str | None


class RotarySite(NamedTuple):
    """An attention module that rotates: where it stands, under which full name, and what it rotates."""

    layer: DecoderLayer
    name: str
    attention: nn.Module
    shape: RotaryShape


def rotary_sites(model: nn.Module) -> list[RotarySite]:
    """Every attention module of the model's decoder layers that rotates queries and keys, in order; once, where layers
    share it.

    Raises:
        UnsupportedModelError: there is none, or one that cannot be adapted.
    """
    _refuse_without_rotary_attention(model)
    sites: dict[int, RotarySite] = {}
    for layer in decoder_layers(model):
        for name, attention in layer.rotary_attention.items():
            if id(attention) not in sites:
                shape = probe(model, name, attention)
                if shape is not None:
                    sites[id(attention)] = RotarySite(layer, name, attention, shape)
    if not sites:
        raise UnsupportedModelError(f"{type(model).__name__} rotates no queries and keys in any of its layers")
    return list(sites.values())


def probe(model: nn.Module, name: str, attention: nn.Module) -> RotaryShape | None:
    """What the attention module hands to its rotary function, or None where it does not rotate, as in layers without
    position embeddings (NoPE).

    Args:
        model (nn.Module): holds the attention module under `name`, and the rotary embedding that serves it.

    Raises:
        UnsupportedModelError: the module cannot be followed, or its rotary function fits no known layout. Nothing was
            changed.
    """
    layer_type = _layer_type(attention)
    if layer_type in _types_without_rotation(attention):
        return None
    rotary = _rotary_embedding(model, name)
    if rotary is None:
        return None
    embeddings = _position_embeddings(rotary, attention, layer_type)
    watched, outputs = watch(model, name, attention, embeddings)
    if not watched:
        return None
    function, call = watched[0]
    cos, head_dim = call.adapted.cos, call.states[0].shape[-1]
    layout = find_layout(function, call, head_dim, cos, _device(attention))
    if layout is None:
        foreign = function.__module__ != type(attention).__module__
        raise UnsupportedModelError(
            f"{described(attention)}: its {function.__name__} fits no known layout for heads of {head_dim} and cos "
            f"{cos.shape[-1]} wide (pairs i, i + R / 2 or 2i, 2i + 1)"
            + f". It is {function.__module__}'s, not the family's own: let that library leave it alone (Liger: "
            "rope=False), or patch first" * foreign
        )
    rotated = call.states if len(call.states) == 2 else [one.call.states[0] for one in watched]
    (heads, query), *keys = ((x.shape[1], source(x, outputs)) for x in map(layout.heads_first, rotated))
    key_heads, key = keys[0] if keys else (0, None)
    return RotaryShape(call.adapted.hidden_states.shape[-1], heads, key_heads, head_dim, layout, query, key)


def _layer_type(attention: nn.Module) -> str | None:
    layer_types = getattr(getattr(attention, "config", None), "layer_types", None)
    return layer_types[attention.layer_idx] if layer_types else None


def _types_without_rotation(attention: nn.Module) -> list[str]:
    """The types of layer that the configuration gives no rotary parameters, where it tells them apart."""
    parameters = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
    return [layer_type for layer_type, own in parameters.items() if own is None]


def _rotary_embedding(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest rotary embedding above the attention module; models without position embeddings have none."""
    for depth in range(name.count("."), -1, -1):
        above = model.get_submodule(".".join(name.split(".")[:depth]))
        for module in above.modules():
            if _frequencies(module) is not None:
                return module
    return None


def _position_embeddings(
    rotary: nn.Module, attention: nn.Module, layer_type: str | None
) -> Tensor | tuple[Tensor, Tensor]:
    """(cos, sin) or cos + i sin as the rotary embedding gives it to layers of this type."""
    device, errors = _frequencies(rotary).device, []
    arguments = {"x": torch.empty(1, TOKENS, 1, device=device)}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        arguments["layer_type"] = layer_type
    positions = torch.arange(TOKENS, device=device)[None]
    for position_ids in (positions, positions.expand(3, 1, -1)):  # of an image's time, row and column
        try:
            with torch.no_grad():  # without hooks: ZeRO-3 has one that notes which modules run
                return rotary.forward(**arguments, position_ids=position_ids)
        except Exception as error:
            errors.append(error)
    raise UnsupportedModelError(
        f"{described(attention)}: its {type(rotary).__name__} gives no cos and sin for layers of type {layer_type} "
        f"({type(errors[0]).__name__}: {errors[0]})"
    ) from errors[0]


def _frequencies(module: nn.Module) -> Tensor | None:
    return next((buffer for name, buffer in module.named_buffers(recurse=False) if "inv_freq" in name), None)


def _device(attention: nn.Module) -> torch.device:
    """Where the family's function can be tried: another library's may run on a GPU alone."""
    device = next(attention.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _refuse_without_rotary_attention(model: nn.Module) -> None:
    classes = dict.fromkeys(type(module) for module in model.modules())
    if any(rotary_functions(c) is not None for c in classes):
        return
    inside = [c for c in classes if _rotates_on_its_own(c)]
    if inside:
        raise UnsupportedModelError(
            f"{type(model).__name__} rotates inside {inside[0].__name__}, which is handed no position_embeddings (cos "
            "and sin) that RoSA could work on"
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} has no rotary attention: none of its modules calls a rotary function on "
        "position_embeddings, and RoSA enhances rotated queries and keys"
    )


def _rotates_on_its_own(module_class: type[nn.Module]) -> bool:
    forward = inspect.unwrap(module_class.forward)
    names = [name for name in getattr(getattr(forward, "__code__", None), "co_names", ()) if "rotary" in name]
    return any(callable(forward.__globals__.get(name, getattr(module_class, name, None))) for name in names)
