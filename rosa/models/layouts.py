"""In which layout a family's rotary function does RoPE: it is fed random heads and compared with RoPE in every one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rosa.models.rotary import RotaryCall, RotaryLayout
from rosa_kernels import rope_roae_reference

TOKENS = 3


def find_layout(
    function: Callable, call: RotaryCall, head_dim: int, cos: Tensor, device: torch.device
) -> RotaryLayout | None:
    """The known layout in which the function does RoPE, None where it fits none.

    Args:
        function (callable): a family's rotary function.
        call (RotaryCall): how a module called it.
        head_dim (int): the width of what it rotates.
        cos (Tensor): as the model makes it; of its shape and dtype alone anything is read.
        device (torch.device): where to try it.
    """
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
