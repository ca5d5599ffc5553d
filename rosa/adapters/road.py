"""RoAd (2D rotary adaptation): the module that is added to a linear layer, and its meeting with RoPE."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.models.rotary import RotaryLayout, attach
from rosa_kernels import road, rope_road
from rosa_kernels.road_reference import NUMBERS


class Pairing(NamedTuple):
    """Which outputs are a pair: j and j + group / 2 within groups; where `head_dim` is given, each head begins with one
    group and the rest of it pairs as neighbours."""

    group: int
    head_dim: int | None = None

    def fault(self, width: int) -> str | None:
        """Why an output of this width cannot be paired so, in words, or None where it can."""
        block = self.group if self.head_dim is None else self.head_dim
        if width % 2:
            return f"it has {width} outputs, an odd number"
        return None if width % block == 0 else f"its {width} outputs are no multiple of {block}"


class Road(nn.Module):
    """RoAd of a linear layer's output: z = first * h + second * rot(h) (Eq. 4).

    Parameters: theta, angles in radians, and alpha, scales, `[numbers]` each; an output has NUMBERS[variant] of both.
    They start at 0 and 1, which is the identity.

    Args:
        variant (int): 1, 2 or 4.
        pairing (Pairing): which outputs are a pair.
        width (int): of the output.
        dtype (torch.dtype): of the parameters.
        device (torch.device): where they are made.
        empty (bool): leave them without values, for those of an adapter that is loaded.
    """

    CHILD = "road"  # under this name a linear layer has it

    def __init__(
        self,
        variant: int,
        pairing: Pairing,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        empty: bool = False,
    ):
        super().__init__()
        self.variant, self.pairing, self.width = variant, pairing, width
        self.joined = False  # whether the attention module has a RopeRoad for it
        numbers = self.numbers(variant, width)
        self.theta = nn.Parameter(torch.empty(numbers, dtype=dtype, device=device))
        self.alpha = nn.Parameter(torch.empty(numbers, dtype=dtype, device=device))
        if not empty:
            self.reset_parameters()

    @staticmethod
    def numbers(variant: int, width: int) -> int:
        """How many angles, and as many scales, an output of this width has."""
        return int(NUMBERS[variant] * width)

    def reset_parameters(self) -> None:
        """To the identity: the model computes what it computed before."""
        nn.init.zeros_(self.theta)
        nn.init.ones_(self.alpha)

    def forward(self, h: Tensor, inplace: bool = False) -> Tensor:
        """RoAd of an output `[..., width]`; shape and dtype as given. `inplace` lets h be overwritten, as `road` has
        it."""
        return road(h, self.theta, self.alpha, inplace=inplace, **self.options)

    @property
    def before_rope(self) -> bool:
        """Whether the attention module's RopeRoad does it, in one launch with RoPE. Not where accelerate offloads it:
        it has values inside its own forward only."""
        return self.joined and not self.theta.is_meta

    @property
    def options(self) -> dict[str, Any]:
        """What the kernels want to know beside the parameters."""
        return dict(variant=self.variant, **self.pairing._asdict())

    def attach(self, linear: nn.Module) -> list[RemovableHandle]:
        """Has the linear layer's output go through its child CHILD, whichever that is; removing the hooks silences
        it."""
        return [linear.register_forward_hook(functools.partial(_adapt_output, self.CHILD))]

    def extra_repr(self) -> str:
        """The numbers that define the module, for `print(model)`."""
        return f"variant={self.variant}, pairing={self.pairing}, width={self.width}"


def _adapt_output(child: str, linear: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of an adapted linear layer."""
    module = getattr(linear, child, None)  # None where the adapter that is switched in leaves this layer out
    if module is None or module.before_rope:
        return output
    # Hooks of others may keep the output as it was.
    alone = len(linear._forward_hooks) == 1 and not module._forward_hooks and not module._forward_pre_hooks
    return module(output, inplace=alone)


class RopeRoad(nn.Module):
    """A rotary adapter without parameters of its own: RoAd of queries and keys, then RoPE, in one launch.

    It belongs where the model's rotary function is handed the outputs of two linear layers as they are, and stands for
    their own RoAd modules, which keep the parameters.

    Args:
        layout (RotaryLayout): how the model rotates.
        query, key (Road): of the linear layers that make queries and keys; None for one that is not adapted, or not so.
    """

    CHILD = "rope_road"

    def __init__(self, layout: RotaryLayout, query: Road | None, key: Road | None):
        super().__init__()
        self.layout = layout
        self.roads = (query, key)  # in a tuple, and so no children: their parameters have names already

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adapted queries and keys after rotation; the arguments are those of RoAE's forward."""
        turn = self.layout.heads_first
        weights = [(road.theta, road.alpha) if road is not None and road.before_rope else None for road in self.roads]
        options = next(road.options for road in self.roads if road is not None)
        q, k = rope_road(
            turn(q), turn(k), *self.layout.pairwise(cos, sin), *weights, self.index(q),
            interleaved=self.layout.interleaved, rotary_dim=self.layout.rotary_dim, **options,
        )  # fmt: skip
        return turn(q), turn(k)

    def index(self, q: Tensor) -> Tensor | None:
        """Which row of the parameters is each sequence's, where they are tables; here they are those of all."""
        return None

    def attach(self, attention: nn.Module) -> list[RemovableHandle]:
        """Has the attention module's rotary function served by its child CHILD, whichever that is."""
        return attach(attention, self.CHILD, self)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"layout={self.layout}"


def wrapped_since(modules: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module]) -> str | None:
    """The name of a linear layer that something was put around, LoRA for example, since RoAd went into one launch with
    RoPE there, which turns that too: in the layer's weights, or behind the layer itself, RoAd would not.

    Args:
        modules, hosts (mapping): those of an adapter.
    """
    names = {module: name for name, module in modules.items()}
    for name, rope in modules.items():
        roads = rope.roads if isinstance(rope, RopeRoad) else ()
        for linear in (names[own] for own in roads if own is not None):
            if hosts[name].get_submodule(linear.removeprefix(f"{name}.")) is not hosts[linear]:
                return linear
    return None
