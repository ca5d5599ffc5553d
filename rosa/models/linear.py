"""Finds the linear layers of a model's decoder layers, quantized ones and GPT-2's transposed ones too."""

from __future__ import annotations

import functools
import inspect
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa.errors import UnsupportedModelError
from rosa.models.decoder import DecoderLayer, decoder_layers


class LinearSite(NamedTuple):
    """A linear layer: the decoder layer it stands in, its full name, and how many outputs it has."""

    layer: DecoderLayer
    name: str
    linear: nn.Module
    width: int


def linear_sites(model: nn.Module) -> list[LinearSite]:
    """Every linear layer of the model's decoder layers, in order; once, where layers share it. One that PEFT has
    wrapped is the wrapper, whose output is what follows sees; layers within it are its own.

    Raises:
        UnsupportedModelError: the model has no decoder layers, or none with linear layers.
    """
    sites: dict[int, LinearSite] = {}
    for layer in decoder_layers(model):
        outermost = None
        for name, module in layer.module.named_modules():
            if (outermost is not None and name.startswith(f"{outermost}.")) or (width := output_width(module)) is None:
                continue
            outermost = name
            sites.setdefault(id(module), LinearSite(layer, f"{layer.name}.{name}", module, width))
    if not sites:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layers in its decoder layers")
    return list(sites.values())


def passed_by(model: nn.Module, site: LinearSite) -> bool:
    """Whether what holds the linear layer computes with its weight by itself, as Mamba's fused kernels and some routers
    do: nobody sees the layer's own output there, at least on some devices."""
    parent, _, name = site.name.rpartition(".")
    return name in _weights_taken(type(model.get_submodule(parent)))


@functools.cache
def _weights_taken(module_class: type[nn.Module]) -> frozenset[str]:
    """The children whose whole weight the class's forward takes, or a method that it calls."""
    methods, seen, taken = {"forward"}, set(), set()
    while methods:
        seen.add(name := methods.pop())
        method = inspect.unwrap(getattr(module_class, name, None))
        if not inspect.isfunction(method) or method.__module__.startswith("torch."):
            continue
        methods |= {*method.__code__.co_names} - seen
        try:
            text = inspect.getsource(method)
        except OSError:  # it was made without a file
            continue
        # Not a part of it, as Bloom's exact products of shards do, nor what it is like.
        taken.update(re.findall(r"\bself\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape)\b)", text))
    return frozenset(taken)


def output_width(module: nn.Module) -> int | None:
    """How many outputs a linear layer has, or None where the module is none."""
    if isinstance(getattr(module, "in_features", None), int):
        return getattr(module, "out_features", None) if _gives_its_product(module) else None
    return module.nf if is_conv1d(module) else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear layer as GPT-2 has them, whose weight is `[inputs, outputs]`."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer that is not quantized computes its weight's product and adds its bias, and no more: by the
    code of `nn.Linear` or GPT-2's, or by that of a family, as Falcon's, which is tried out."""
    if is_conv1d(linear) or type(linear).forward is nn.Linear.forward:
        return True
    if not _is_of_a_family(linear) or not isinstance(linear, nn.Linear):
        return False
    x = torch.linspace(-1, 1, linear.in_features).to(linear.weight)[None]
    with torch.no_grad():
        return torch.allclose(linear.forward(x), F.linear(x, linear.weight, linear.bias), rtol=1e-2)


def _gives_its_product(module: nn.Module) -> bool:
    """Not so the routers of mixtures of experts that are subclasses of `nn.Linear`, and give the choice of experts, nor
    DeepSeek-V4's grouped layers, which want their inputs in groups."""
    if not _is_of_a_family(module):
        return True
    with torch.no_grad():
        try:
            return isinstance(module.forward(module.weight.new_zeros(1, module.in_features)), Tensor)
        except RuntimeError:
            return False


def _is_of_a_family(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")
