"""Attaches a rotary adapter to a Hugging Face attention module: the part that knows no particular adapter.

A rotary adapter is a module called as `adapter(q, k, cos, sin, hidden_states) -> (q, k)` in place of the model family's
own `apply_rotary_pos_emb(q, k, cos, sin)`. A hook of the attention module puts an `AdaptedCos` where cos stood; the
family's function, replaced once by `_serve_adapters`, calls the adapter when it is handed one and the original for
everything else, so models that are not adapted are untouched. There is no global state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.decoder import rotary_globals
from rosa.errors import UnsupportedModelError
from rosa_kernels import rope_roae_reference


class AdaptedCos(NamedTuple):
    """What the rotary function of an adapted attention module is handed in place of cos."""

    cos: Tensor
    hidden_states: Tensor
    adapter: nn.Module


class RotaryLayout(NamedTuple):
    """How a family's rotary function pairs the elements of a head and reads cos and sin.

    `columns` says which columns of cos hold the value of each pair: all of them (cos is half as wide as the head's
    rotary part), the first half, or the even ones. `sign` is that of sin: -1 where the family rotates the other way.
    """

    rotary_dim: int
    interleaved: bool
    columns: Literal["all", "first half", "even"]
    sign: Literal[1, -1] = 1

    def pairwise(self, t: Tensor) -> Tensor:
        """cos or sin as the model gives it, `[..., width]`, with one column a pair, `[..., rotary_dim / 2]`; a view."""
        expected = self.rotary_dim // 2 if self.columns == "all" else self.rotary_dim
        if t.shape[-1] != expected:
            raise UnsupportedModelError(
                f"the model gave its rotary function a cos or sin {t.shape[-1]} wide; when it was patched, {expected} "
                f"was found to fit ({self})"
            )
        if self.columns == "all":
            return t
        return t[..., ::2] if self.columns == "even" else t[..., : self.rotary_dim // 2]

    def _widen(self, t: Tensor) -> Tensor:
        """The inverse of `pairwise`."""
        if self.columns == "all":
            return t
        return t.repeat_interleave(2, dim=-1) if self.columns == "even" else torch.cat((t, t), dim=-1)


def attach(attention: nn.Module, name: str, adapter: nn.Module) -> RemovableHandle:
    """Adds the rotary adapter to the attention module as its child `name`; removing the handle's hook silences it."""
    functions = rotary_globals(attention)
    if not hasattr(functions["apply_rotary_pos_emb"], "serves_rotary_adapters"):
        functions["apply_rotary_pos_emb"] = _serve_adapters(functions["apply_rotary_pos_emb"])
    attention.add_module(name, adapter)
    return attention.register_forward_pre_hook(functools.partial(_hand_over, name), with_kwargs=True)


def probe_layout(attention: nn.Module, head_dim: int, rotary_dim: int) -> RotaryLayout:
    """Reads the layout off the family's own rotary function, by feeding it random heads and comparing.

    Args:
        attention (nn.Module): an attention module whose forward calls `apply_rotary_pos_emb`.
        head_dim (int): size of a head.
        rotary_dim (int): R, the elements of a head that are rotated.

    Raises:
        UnsupportedModelError: the function fits no known layout.
    """
    function = rotary_globals(attention)["apply_rotary_pos_emb"]
    generator = torch.Generator("cpu").manual_seed(0)
    cos, sin = torch.randn(2, 1, 3, rotary_dim // 2, generator=generator, device="cpu")
    # Some families split the part that is not rotated off before they call the function.
    for width in dict.fromkeys((head_dim, rotary_dim)):
        q, k = torch.randn(2, 1, 2, 3, width, generator=generator, device="cpu")
        for layout in _known_layouts(rotary_dim):
            if _agrees(function, layout, q, k, cos, sin):
                return layout
    raise UnsupportedModelError(
        f"{type(attention).__name__} of {type(attention).__module__}: its apply_rotary_pos_emb fits no known layout "
        f"for {rotary_dim} rotary elements of a head of {head_dim} (pairs i, i + R/2 or 2i, 2i + 1)"
    )


def _known_layouts(rotary_dim: int) -> Iterator[RotaryLayout]:
    for sign in (1, -1):
        yield RotaryLayout(rotary_dim, False, "first half", sign)
        yield RotaryLayout(rotary_dim, True, "even", sign)
        yield RotaryLayout(rotary_dim, True, "first half", sign)
        yield RotaryLayout(rotary_dim, False, "all", sign)
        yield RotaryLayout(rotary_dim, True, "all", sign)


def _agrees(function: Callable, layout: RotaryLayout, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the family's function does what RoPE in this layout does; `cos` and `sin` have one column a pair."""
    try:
        theirs = function(q, k, layout._widen(cos), layout._widen(sin))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False  # cos of this width does not fit the function
    silent = q.new_zeros(1, q.shape[2], q.shape[1] * 2)
    ours = rope_roae_reference(
        q, k, cos, layout.sign * sin, silent, alpha=0.0, interleaved=layout.interleaved, rotary_dim=layout.rotary_dim
    )
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))


def _hand_over(name: str, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of an adapted attention module: puts an AdaptedCos where cos stood."""
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    adapter = getattr(attention, name)
    if "position_embeddings" in kwargs:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (AdaptedCos(cos, hidden_states, adapter), sin)}
    cos, sin = args[1]
    return (args[0], (AdaptedCos(cos, hidden_states, adapter), sin), *args[2:]), kwargs


def _serve_adapters(original: Callable) -> Callable:
    """A family's rotary function that also serves adapted attention modules."""

    @functools.wraps(original)
    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        if isinstance(cos, AdaptedCos):
            if args or kwargs:
                raise UnsupportedModelError(
                    f"{original.__module__} calls apply_rotary_pos_emb with further arguments ({args}, {kwargs}); "
                    "RoSA expects (q, k, cos, sin), with heads before the sequence"
                )
            return cos.adapter(q, k, cos.cos, sin, cos.hidden_states)
        return original(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb.serves_rotary_adapters = True
    return apply_rotary_pos_emb
