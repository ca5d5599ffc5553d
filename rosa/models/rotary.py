"""Attaches a rotary adapter to a Hugging Face attention module: the part that knows no particular adapter.

A rotary adapter is a module called as `adapter(q, k, cos, sin, hidden_states) -> (q, k)` in place of the model family's
own rotary function, with what that was called with: its `RotaryLayout` tells how to read it. Where the family rotates
queries and keys one at a time, `adapter.rotate_one(x, cos, sin, hidden_states) -> x` is called. A hook of the attention
module puts an `AdaptedCos` where cos stood; the family's function, replaced by one made by `_serve_adapters`, calls the
adapter when it is handed one and the original for everything else, so models that are not adapted are untouched. There
is no global state.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.errors import UnsupportedModelError
from rosa.models.decoder import rotary_functions


class AdaptedCos(NamedTuple):
    """What the rotary function of an adapted attention module is handed in place of cos, or of the complex cos + i sin
    that some families have.

    `adapter` gives the adapter, and is not the module itself: accelerate's hooks, which device maps and offloading put
    around attention, move all that can be moved in what attention is handed.
    """

    cos: Tensor
    hidden_states: Tensor
    adapter: Callable[[], nn.Module]

    def to(self, device: torch.device) -> AdaptedCos:
        """What attention modules do to a complex cos + i sin before they rotate."""
        return self._replace(cos=self.cos.to(device))

    def _is_no_tensor(self) -> None:
        raise RuntimeError(
            "a rotary function that serves no adapter was handed an adapted module's cos: another library replaced the "
            "family's function after this model was compiled. Let that library leave it alone (Liger: rope=False), or "
            "compile the model after it"
        )

    shape = unsqueeze = property(_is_no_tensor)  # what a function that takes it for a tensor asks first


class RotaryLayout(NamedTuple):
    """How a family's rotary function pairs the elements of a head and reads cos and sin.

    `columns` says which columns of cos hold the value of each pair: all of them (cos is half as wide as the head's
    rotary part), the first half, or the even ones; "complex" is all of them, of cos + i sin. `sign` is that of sin: -1
    where the family rotates the other way. `deinterleaves`: the function takes elements 2i and 2i + 1 as a pair and
    leaves them at i and i + R / 2, as DeepSeek's does; `interleaved` is False then. `sequence_first`: it is handed
    queries and keys `[batch, seq, heads, head_dim]`.
    """

    rotary_dim: int
    interleaved: bool
    columns: Literal["all", "first half", "even", "complex"]
    sign: Literal[1, -1] = 1
    deinterleaves: bool = False
    sequence_first: bool = False

    def pairwise(self, cos: Tensor, sin: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin as the model gives them, `[..., width]`, with one column a pair, `[..., rotary_dim / 2]`; views,
        where the sign is 1."""
        expected = self.rotary_dim if self.columns in ("first half", "even") else self.rotary_dim // 2
        if cos.shape[-1] != expected:
            raise UnsupportedModelError(
                f"the model gave its rotary function a cos or sin {cos.shape[-1]} wide; when it was patched, "
                f"{expected} was found to fit ({self})"
            )
        if self.columns == "complex":
            cos, sin = cos.real, cos.imag
        elif self.columns == "even":
            cos, sin = cos[..., ::2], sin[..., ::2]
        elif self.columns == "first half":
            cos, sin = cos[..., : self.rotary_dim // 2], sin[..., : self.rotary_dim // 2]
        return cos, sin if self.sign == 1 else -sin

    def widen(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `pairwise`: the arguments of the family's rotary function after queries and keys."""
        if self.columns == "complex":
            return (torch.complex(cos, self.sign * sin),)
        cos, sin = cos, self.sign * sin
        if self.columns == "even":
            return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        if self.columns == "first half":
            return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        return cos, sin

    def heads_first(self, x: Tensor) -> Tensor:
        """Queries or keys as the function is handed them, `[batch, heads, seq, head_dim]`; its own inverse."""
        return x.transpose(1, 2) if self.sequence_first else x

    def arrange(self, x: Tensor) -> Tensor:
        """Queries or keys `[..., head_dim]` with their pairs where the function leaves them."""
        return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1) if self.deinterleaves else x


class RotaryCall(NamedTuple):
    """A call of a family's rotary function: queries and keys, or one of the two, as the family lays them out; cos or
    cos + i sin, and sin where it comes apart; and the rest by name."""

    states: list[Tensor]
    adapted: AdaptedCos
    sin: Tensor | None
    options: dict[str, Any]


def attach(attention: nn.Module, name: str, adapter: nn.Module) -> list[RemovableHandle]:
    """Adds the rotary adapter to the attention module as its child `name`; removing the hooks silences it."""
    serve_adapters(type(attention))
    attention.add_module(name, adapter)
    # Modules within attention that rotate something of their own, such as the indexers of sparse attention.
    inner = [m for m in attention.modules() if m is not attention and rotary_functions(type(m)) is not None]
    hooks = [m.register_forward_pre_hook(_hand_back, with_kwargs=True) for m in inner]
    at = list(inspect.signature(type(attention).forward).parameters).index("position_embeddings") - 1  # without self
    hand_over = functools.partial(_hand_over, name, at)
    return [attention.register_forward_pre_hook(hand_over, with_kwargs=True), *hooks]


def serve_adapters(attention_class: type[nn.Module]) -> list[str]:
    """Lets the rotary functions that the class's forward calls serve adapters.

    Returns:
        In words, those of another library that now do: it replaced the family's own.
    """
    namespace, names = rotary_functions(attention_class)
    foreign = []
    for name in names:
        function = namespace[name]
        if _serves(function):
            continue
        if function.__module__ != namespace["__name__"]:
            foreign.append(f"{name} of {namespace['__name__']} is {function.__module__}.{function.__qualname__} now")
        namespace[name] = _serve_adapters(function)
    return foreign


def _go_on_serving(attention_class: type[nn.Module]) -> None:
    """Adapts again where another library, such as Liger, replaced a rotary function since the model was patched."""
    for replaced in serve_adapters(attention_class):
        warnings.warn(
            f"{replaced}, since the model was patched: layers that RoSA adapts do not call it, they rotate as the "
            "family's own function did",
            stacklevel=2,
        )


def family_function(function: Callable) -> Callable:
    """A rotary function as it was before it served adapters."""
    return function.__wrapped__ if _serves(function) else function


def _serves(function: Callable) -> bool:
    # Not merely the attribute: functools.wraps hands it on to what another library puts around the function.
    return getattr(function, "serves_rotary_adapters", None) is function


def _hand_over(name: str, at: int, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of an adapted attention module: puts an AdaptedCos where cos stood, which is in the argument
    `position_embeddings` or, where that has no name, in the one at place `at`."""
    if getattr(attention, name, None) is None:  # the adapter that is switched in leaves this module out
        return args, kwargs
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    adapter = functools.partial(getattr, attention, name)
    if not torch.compiler.is_compiling():
        _go_on_serving(type(attention))
    embeddings = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[at]
    if isinstance(embeddings, (Tensor, AdaptedCos)):  # cos + i sin, perhaps in an adapter's hands already
        embeddings = AdaptedCos(embeddings, hidden_states, adapter)
    else:
        cos, sin = embeddings
        embeddings = (AdaptedCos(cos, hidden_states, adapter), sin)
    if "position_embeddings" in kwargs:
        return args, {**kwargs, "position_embeddings": embeddings}
    return (*args[:at], embeddings, *args[at + 1 :]), kwargs


def _hand_back(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a rotary module within an adapted attention module: cos as the model gave it."""

    def own(value: Any) -> Any:
        if isinstance(value, AdaptedCos):
            return value.cos
        adapted = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], AdaptedCos)
        return (value[0].cos, value[1]) if adapted else value

    return tuple(own(value) for value in args), {name: own(value) for name, value in kwargs.items()}


def read_call(function: Callable, args: tuple, kwargs: dict) -> RotaryCall | None:
    """A call of the family's rotary function on behalf of an adapted module, or None where it is another's.

    Raises:
        UnsupportedModelError: the call has arguments that RoSA does not know.
    """
    at = next((i for i, value in enumerate(args) if isinstance(value, AdaptedCos)), None)
    if at is None:
        return None
    states, adapted, rest = list(args[:at]), args[at], args[at + 1 :]
    if at not in (1, 2) or len(rest) > 1 or not kwargs.keys() <= {"unsqueeze_dim"}:
        raise UnsupportedModelError(
            f"{function.__module__} calls {function.__name__} with {len(args)} arguments, and by name "
            f"{list(kwargs)}: RoSA knows (q, k, cos, sin), (x, cos, sin) and (q, k, cos + i sin), and unsqueeze_dim"
        )
    return RotaryCall(states, adapted, rest[0] if rest else None, kwargs)


def _serve_adapters(original: Callable) -> Callable:
    """A family's rotary function that also serves adapted attention modules."""

    @functools.wraps(original)
    def rotate(*args, **kwargs):
        call = read_call(original, args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        states, (cos, hidden_states, adapter), sin, _ = call
        rotary = adapter()
        return (rotary if len(states) == 2 else rotary.rotate_one)(*states, cos, sin, hidden_states)

    rotate.serves_rotary_adapters = rotate
    return rotate
