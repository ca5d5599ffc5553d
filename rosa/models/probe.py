"""Finds out how an attention module rotates queries and keys: by running a blank twin of it on the meta device.

The twin's rotary functions are watched: which one is called, and with what shapes. That one is then fed random heads
and compared with RoPE in every known layout. Nothing is read off the family's name.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosa.errors import UnsupportedModelError
from rosa.models.decoder import DecoderLayer, decoder_layers, rotary_functions
from rosa.models.linear import output_width
from rosa.models.rotary import RotaryCall, RotaryLayout, attach, family_function, read_call
from rosa_kernels import rope_roae_reference

TOKENS = 3
_one_at_a_time = threading.Lock()


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


class _Watched(NamedTuple):
    function: Callable
    call: RotaryCall


class _Output(NamedTuple):
    """What a linear layer of the twin gave, and how often it had been written to by then."""

    name: str
    tensor: Tensor
    version: int


class _SeenEnough(Exception):
    """Ends the twin's forward once queries and keys were handed over."""


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
    watched, outputs = _watch(model, name, attention, embeddings)
    if not watched:
        return None
    function, call = watched[0]
    cos, head_dim = call.adapted.cos, call.states[0].shape[-1]
    layout = _layout(function, call, head_dim, cos, _device(attention))
    if layout is None:
        foreign = function.__module__ != type(attention).__module__
        raise UnsupportedModelError(
            f"{_described(attention)}: its {function.__name__} fits no known layout for heads of {head_dim} and cos "
            f"{cos.shape[-1]} wide (pairs i, i + R / 2 or 2i, 2i + 1)"
            + f". It is {function.__module__}'s, not the family's own: let that library leave it alone (Liger: "
            "rope=False), or patch first" * foreign
        )
    rotated = call.states if len(call.states) == 2 else [one.call.states[0] for one in watched]
    (heads, query), *keys = ((x.shape[1], _source(x, outputs)) for x in map(layout.heads_first, rotated))
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
        f"{_described(attention)}: its {type(rotary).__name__} gives no cos and sin for layers of type {layer_type} "
        f"({type(errors[0]).__name__}: {errors[0]})"
    ) from errors[0]


def _frequencies(module: nn.Module) -> Tensor | None:
    return next((buffer for name, buffer in module.named_buffers(recurse=False) if "inv_freq" in name), None)


def _watch(
    model: nn.Module, name: str, attention: nn.Module, embeddings: Tensor | tuple[Tensor, Tensor]
) -> tuple[list[_Watched], list[_Output]]:
    """The calls that a twin of the module makes of its rotary functions, one of queries and keys or one of each, and
    what its linear layers gave before."""
    watched: list[_Watched] = []
    errors: list[Exception] = []
    with _watching(type(attention), watched), torch.no_grad():
        for twin, arguments in _attempts(model, name, attention, embeddings):
            outputs = _outputs_of_linear_layers(twin)
            try:
                twin(**arguments)
                return watched, outputs
            except _SeenEnough:
                return watched, outputs
            except Exception as error:
                if watched:  # queries were seen; this layer's keys come from another layer
                    return watched, outputs
                errors.append(error)
    raise UnsupportedModelError(
        f"{_described(attention)}: its forward cannot be followed ({type(errors[0]).__name__}: {errors[0]})"
    )


def _attempts(
    model: nn.Module, name: str, attention: nn.Module, embeddings: Tensor | tuple[Tensor, Tensor]
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Twins and arguments for their forward, until one is followed: indexers of sparse attention want a mask, and they
    and mixtures of experts within attention want values to choose by, which the meta device has not."""
    for device in ("meta", "cpu"):
        twin = _twin(attention, nearest_config(model, name), device)
        for hidden_size, masked in itertools.product(_widths(twin), (False, True)):
            yield twin, _arguments(twin, hidden_size, _blank(embeddings, device), masked, device)


def _outputs_of_linear_layers(twin: nn.Module) -> list[_Output]:
    """A list to which the twin's linear layers add what they give."""
    outputs: list[_Output] = []
    for name, module in twin.named_modules():
        if output_width(module) is not None:
            module.register_forward_hook(
                lambda module, args, output, name=name: outputs.append(_Output(name, output, _version(output)))
            )
    return outputs


def _source(x: Tensor, outputs: list[_Output]) -> str | None:
    """The linear layer whose output, and all of it, queries or keys `[b, h, l, d]` are a view of, head by head."""
    batch, heads, seq, head_dim = x.shape
    for name, tensor, version in outputs:
        whole = tensor.is_contiguous() and tensor.shape == (batch, seq, heads * head_dim)
        if whole and _version(tensor) == version and tensor.untyped_storage()._cdata == x.untyped_storage()._cdata:
            by_heads = tensor.unflatten(-1, (heads, head_dim)).transpose(1, 2)
            return name if x.stride() == by_heads.stride() else None
    return None


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; those of the inference mode do not count."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def _watching(attention_class: type[nn.Module], watched: list[_Watched]) -> Iterator[None]:
    namespace, names = rotary_functions(attention_class)
    thread = threading.get_ident()

    def watch(original: Callable) -> Callable:
        function = family_function(original)

        def rotate(*args, **kwargs):
            call = read_call(function, args, kwargs)
            if call is None or threading.get_ident() != thread:  # a model of the family that runs meanwhile
                return original(*args, **kwargs)
            watched.append(_Watched(function, call))
            if len(call.states) == 2 or len(watched) == 2:
                raise _SeenEnough
            return call.states[0]

        rotate.serves_rotary_adapters = rotate
        return rotate

    with _one_at_a_time:
        originals = {name: namespace[name] for name in names}
        namespace.update({name: watch(function) for name, function in originals.items()})
        try:
            yield
        finally:
            namespace.update(originals)


def _twin(attention: nn.Module, config: Any, device: str) -> nn.Module:
    """A module of the same class and configuration without trained values, hooks, or what else the original has."""
    parameters = list(inspect.signature(type(attention).__init__).parameters.values())[1:]
    arguments = {
        p.name: getattr(attention, p.name, config if p.name == "config" else p.default)
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    }
    try:
        with torch.device(device), torch.random.fork_rng(devices=()):  # the CPU's twin draws weights
            twin = type(attention)(**arguments)
    except Exception as error:
        raise UnsupportedModelError(
            f"{_described(attention)}: no second one can be made of it ({type(error).__name__}: {error})"
        ) from error
    attach(twin, "adapter", nn.Identity())
    return twin.eval()


def nearest_config(model: nn.Module, name: str) -> Any:
    """The configuration of the module of this name or, where it keeps none, of the nearest one above that does."""
    parts = name.split(".")
    modules = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return next((module.config for module in modules if hasattr(module, "config")), None)


def _widths(twin: nn.Module) -> list[int]:
    """What the width of the module's input may be: the model's, or that of one of its projections."""
    projections = [m.in_features for m in twin.modules() if isinstance(m, nn.Linear)]
    return list(dict.fromkeys((*_model_width(twin), *projections)))


def _model_width(twin: nn.Module) -> list[int]:
    width = getattr(getattr(twin, "config", None), "hidden_size", None)
    return [] if width is None else [width]


def _blank(embeddings: Tensor | tuple[Tensor, Tensor], device: str) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(embeddings, Tensor):
        return torch.ones(embeddings.shape, device=device, dtype=embeddings.dtype)
    return tuple(_blank(one, device) for one in embeddings)


def _arguments(
    twin: nn.Module, hidden_size: int, embeddings: Tensor | tuple[Tensor, Tensor], masked: bool, device: str
) -> dict[str, Any]:
    parameters = inspect.signature(twin.forward).parameters
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    hidden_states = torch.zeros(1, TOKENS, hidden_size, device=device, dtype=next(twin.parameters()).dtype)
    arguments = dict.fromkeys(needed) | {"hidden_states": hidden_states, "position_embeddings": embeddings}
    if masked and "attention_mask" in parameters:
        arguments["attention_mask"] = torch.zeros(1, 1, TOKENS, TOKENS, device=device)
    return arguments


def _device(attention: nn.Module) -> torch.device:
    """Where the family's function can be tried: another library's may run on a GPU alone."""
    device = next(attention.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _layout(
    function: Callable, call: RotaryCall, head_dim: int, cos: Tensor, device: torch.device
) -> RotaryLayout | None:
    """The known layout in which the function does RoPE, with such a cos, called as the module called it."""
    generator = torch.Generator("cpu").manual_seed(0)
    for layout in _known_layouts(call, cos):
        if layout.rotary_dim > head_dim or (layout.deinterleaves and layout.rotary_dim != head_dim):
            continue
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        q, k = draw(2, 1, 2, TOKENS, head_dim).to(device)
        cos, sin = draw(2, 1, TOKENS, layout.rotary_dim // 2).to(device)
        if _agrees(function, call, layout, q, k, cos, sin):
            return layout
    return None


def _known_layouts(call: RotaryCall, cos: Tensor) -> Iterator[RotaryLayout]:
    width = cos.shape[-1]
    for sign in (1, -1):
        if cos.is_complex():
            yield RotaryLayout(2 * width, True, "complex", sign)
            yield RotaryLayout(2 * width, True, "complex", sign, sequence_first=True)
            continue
        sequence_first = call.options.get("unsqueeze_dim", 1) == 2
        yield RotaryLayout(width, False, "first half", sign, sequence_first=sequence_first)
        yield RotaryLayout(width, True, "even", sign, sequence_first=sequence_first)
        yield RotaryLayout(width, True, "first half", sign, sequence_first=sequence_first)
        yield RotaryLayout(width, False, "first half", sign, deinterleaves=True, sequence_first=sequence_first)
        yield RotaryLayout(2 * width, False, "all", sign, sequence_first=sequence_first)
        yield RotaryLayout(2 * width, True, "all", sign, sequence_first=sequence_first)


def _agrees(function, call: RotaryCall, layout: RotaryLayout, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the family's function does what RoPE in this layout does; `cos` and `sin` have one column a pair."""
    rotary, turn = layout.widen(cos, sin), layout.heads_first
    try:
        if len(call.states) == 2:
            theirs = function(turn(q.clone()), turn(k.clone()), *rotary, **call.options)  # Liger's rotates in place
        else:
            theirs = [function(turn(x), *rotary, **call.options) for x in (q, k)]
    except Exception:
        return False  # cos of this width does not fit the function, or it does not run here
    silent = q.new_zeros(1, TOKENS, q.shape[1] * 2)
    ours = rope_roae_reference(
        layout.arrange(q), layout.arrange(k), *layout.pairwise(*rotary, *(None,) * (2 - len(rotary))), silent,
        alpha=0.0, interleaved=layout.interleaved, rotary_dim=layout.rotary_dim,
    )  # fmt: skip
    pairs = zip(map(turn, theirs), ours, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def _described(attention: nn.Module) -> str:
    return f"{type(attention).__name__} of {type(attention).__module__}"


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
