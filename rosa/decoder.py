"""Finds a model's decoder layers, their rotary attention and their norms, without a list of families."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from torch import nn

from rosa.errors import UnsupportedModelError

# The norm before attention and the norm before the MLP (Eq. 5), by the names that Hugging Face gives them. In a layer
# that has several, such as Gemma-2's, which has a norm after attention too, the first name counts.
ATTENTION_NORMS = ("input_layernorm", "ln_1")
MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")


class DecoderLayer(NamedTuple):
    """One decoder layer of a model: its full name and its module."""

    name: str
    module: nn.Module

    @property
    def attention_norm(self) -> nn.Module:
        """The norm before attention."""
        return _first_child(self.module, ATTENTION_NORMS)

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm before the MLP."""
        return _first_child(self.module, MLP_NORMS)

    @property
    def norms(self) -> dict[str, nn.Module]:
        """The norms that stand in the layer itself, by full name; not the q/k norms inside attention."""
        return {
            f"{self.name}.{name}": child
            for name, child in self.module.named_children()
            if "norm" in type(child).__name__.lower() and isinstance(getattr(child, "weight", None), nn.Parameter)
        }

    @property
    def rotary_attention(self) -> dict[str, nn.Module]:
        """The attention modules that call a rotary function, by full name."""
        return {f"{self.name}.{n}": m for n, m in self.module.named_modules() if n and rotary_globals(m) is not None}


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers in order: the longest list of modules that each have a norm before attention and the MLP.

    Raises:
        UnsupportedModelError: the model has no such list.
    """
    lists = [
        (name, modules)
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        and len(modules)
        and all(_first_child(m, ATTENTION_NORMS) and _first_child(m, MLP_NORMS) for m in modules)
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers with a norm before attention "
            f"({' or '.join(ATTENTION_NORMS)}) and one before the MLP ({' or '.join(MLP_NORMS)})"
        )
    name, modules = max(lists, key=lambda named: len(named[1]))
    return [DecoderLayer(f"{name}.{i}", module) for i, module in enumerate(modules)]


def rotary_globals(attention: nn.Module) -> dict | None:
    """The globals in which the module's forward looks up `apply_rotary_pos_emb`, or None where it does not."""
    forward = inspect.unwrap(type(attention).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "apply_rotary_pos_emb" not in code.co_names or "position_embeddings" not in code.co_varnames:
        return None
    return forward.__globals__ if "apply_rotary_pos_emb" in forward.__globals__ else None


def _first_child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for child in (getattr(module, name, None) for name in names) if child is not None), None)
