"""What an attention module calls its rotary functions with, seen in a blank twin of it on the meta device."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosa.errors import UnsupportedModelError
from rosa.models.decoder import nearest_config, rotary_functions
from rosa.models.linear import output_width
from rosa.models.rotary import RotaryCall, attach, family_function, read_call

TOKENS = 3
_one_at_a_time = threading.Lock()


class Watched(NamedTuple):
    """A call of a rotary function."""

    function: Callable
    call: RotaryCall


class Output(NamedTuple):
    """What a linear layer of the twin gave, and how often it had been written to by then."""

    name: str
    tensor: Tensor
    version: int


class _SeenEnough(Exception):
    """Ends the twin's forward once queries and keys were handed over."""


def watch(
    model: nn.Module, name: str, attention: nn.Module, embeddings: Tensor | tuple[Tensor, Tensor]
) -> tuple[list[Watched], list[Output]]:
    """The calls that a twin of the module makes of its rotary functions, one of queries and keys or one of each, and
    what its linear layers gave before."""
    watched: list[Watched] = []
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
        f"{described(attention)}: its forward cannot be followed ({type(errors[0]).__name__}: {errors[0]})"
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


def _outputs_of_linear_layers(twin: nn.Module) -> list[Output]:
    """A list to which the twin's linear layers add what they give."""
    outputs: list[Output] = []
    for name, module in twin.named_modules():
        if output_width(module) is not None:
            module.register_forward_hook(
                lambda module, args, output, name=name: outputs.append(Output(name, output, _version(output)))
            )
    return outputs


def source(x: Tensor, outputs: list[Output]) -> str | None:
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
def _watching(attention_class: type[nn.Module], watched: list[Watched]) -> Iterator[None]:
    namespace, names = rotary_functions(attention_class)
    thread = threading.get_ident()

    def stand_in(original: Callable) -> Callable:
        function = family_function(original)

        def rotate(*args, **kwargs):
            call = read_call(function, args, kwargs)
            if call is None or threading.get_ident() != thread:  # a model of the family that runs meanwhile
                return original(*args, **kwargs)
            watched.append(Watched(function, call))
            if len(call.states) == 2 or len(watched) == 2:
                raise _SeenEnough
            return call.states[0]

        rotate.serves_rotary_adapters = rotate
        return rotate

    with _one_at_a_time:
        originals = {name: namespace[name] for name in names}
        namespace.update({name: stand_in(function) for name, function in originals.items()})
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
            f"{described(attention)}: no second one can be made of it ({type(error).__name__}: {error})"
        ) from error
    attach(twin, "adapter", nn.Identity())
    return twin.eval()


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


def described(attention: nn.Module) -> str:
    """An attention module, for errors."""
    return f"{type(attention).__name__} of {type(attention).__module__}"
