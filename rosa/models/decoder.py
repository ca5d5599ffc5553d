"""Finds a model's decoder layers, their rotary attention and their norms, without a list of families."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from rosa.errors import UnsupportedModelError

# The norms before attention and before the MLP (Eq. 5), by the names that Hugging Face gives them; a layer's first name
# counts. Blocks with norms after attention and after the MLP only, such as OLMo 2's, are scored by those.
ATTENTION_NORMS = (
    "input_layernorm", "attention_layernorm", "attn_norm", "operator_norm", "ln_attn", "norm_1", "ln_1",
    "post_attention_layernorm",
)  # fmt: skip
MLP_NORMS = (
    "pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "feedforward_layernorm", "mlp_norm",
    "ffn_norm", "ln_mlp", "norm_2", "ln_2", "post_attention_layernorm", "post_feedforward_layernorm",
)  # fmt: skip


class RotaryFunctions(NamedTuple):
    """The globals in which a module's forward looks up its rotary functions, and the names it looks up there."""

    namespace: dict[str, Any]
    names: tuple[str, ...]


class DecoderLayer(NamedTuple):
    """One decoder layer of a model: its full name and its module."""

    name: str
    module: nn.Module

    @property
    def scored_norms(self) -> tuple[nn.Module, ...]:
        """The norm before attention and the norm before the MLP, as far as the layer has them: parallel blocks such as
        Phi's have one for both. Where peft has wrapped a norm, it is the copy that trains. A norm may be without a
        weight."""
        norms = {name: child for name, child in self._own_children() if not isinstance(child, nn.Identity)}
        attention = next((name for name in ATTENTION_NORMS if name in norms), None)
        mlp = next((name for name in MLP_NORMS if name in norms and name != attention), None)
        return tuple(_in_use(norms[name]) for name in (attention, mlp) if name is not None)

    @property
    def norms(self) -> dict[str, nn.Module]:
        """The norms with a weight that stand in the layer itself, by full name; not the q/k norms inside attention.
        Where peft has wrapped a norm, the copy that trains is there by the name of the norm."""
        names = {id(module): f"{self.name}.{name}" for name, module in self.module.named_modules()}
        norms = {names[id(child)]: _in_use(child) for _, child in self._own_children()}
        return {
            name: norm
            for name, norm in norms.items()
            if "norm" in type(norm).__name__.lower() and isinstance(getattr(norm, "weight", None), nn.Parameter)
        }

    @property
    def rotary_attention(self) -> dict[str, nn.Module]:
        """The modules that are handed position embeddings and call a rotary function, by full name; none of those that
        stand inside another, such as the indexers of sparse attention."""
        found: dict[str, nn.Module] = {}
        for name, module in self.module.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if name and not inside and rotary_functions(type(module)) is not None:
                found[name] = module
        return {f"{self.name}.{name}": module for name, module in found.items()}

    def _own_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The children of the layer, and of a block within it that holds both norms and attention (as DBRX has it)."""
        for name, child in self.module.named_children():
            yield name, child
            if rotary_functions(type(child)) is None and any(rotary_functions(type(m)) for m in child.children()):
                yield from child.named_children()


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The layers of the model's text decoder in order: the members of its lists of modules that hold rotary attention
    or the norms that layers are scored by.

    Raises:
        UnsupportedModelError: the model has no such list.
    """
    decoder = text_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lists: dict[str, list[DecoderLayer]] = {}
    for name, modules in decoder.named_modules(prefix=prefix):
        if isinstance(modules, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            layers = [DecoderLayer(f"{name}.{i}", module) for i, module in enumerate(modules)]
            if any(layer.rotary_attention or layer.scored_norms for layer in layers):
                lists[name] = layers
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers: no list of modules with rotary attention, or with a norm "
            f"before attention ({', '.join(ATTENTION_NORMS)}) and before the MLP ({', '.join(MLP_NORMS)})"
        )
    return [layer for layers in lists.values() for layer in layers]


def _in_use(norm: nn.Module) -> nn.Module:
    """The copy of a norm that peft trains in its place, by LN tuning or as a module to save; else the norm itself."""
    for of_peft in ("ln_tuning_layers", "modules_to_save"):
        copies = getattr(norm, of_peft, None)
        if isinstance(copies, nn.ModuleDict):
            return next((copies[name] for name in norm.active_adapters if name in copies), norm)
    return norm


@functools.cache
def rotary_functions(module_class: type[nn.Module]) -> RotaryFunctions | None:
    """The rotary functions that the class's forward calls, or None where it calls none or is handed no
    `position_embeddings`."""
    forward = inspect.unwrap(module_class.forward)
    code = getattr(forward, "__code__", None)
    if code is None or "position_embeddings" not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        return None
    names = tuple(name for name in code.co_names if "rotary" in name and callable(forward.__globals__.get(name)))
    return RotaryFunctions(forward.__globals__, names) if names else None


def text_decoder(model: nn.Module) -> nn.Module:
    """The part of the model that decodes text, where transformers tells: not the vision tower of a multimodal one. The
    model itself, where it does not tell."""
    for module in model.modules():
        decoder = module.get_decoder() if hasattr(module, "get_decoder") else None
        if decoder is not None and any(isinstance(m, nn.ModuleList) for m in decoder.modules()):
            return decoder
    return model


def nearest_config(model: nn.Module, name: str) -> Any:
    """The configuration of the module of this name or, where it keeps none, of the nearest one above that does."""
    parts = name.split(".")
    modules = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return next((module.config for module in modules if hasattr(module, "config")), None)
