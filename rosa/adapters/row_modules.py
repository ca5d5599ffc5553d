"""What stands in a model in the adapters' place while each row of the batch has its own: a module for each of theirs,
and the norms that they train.

None of these modules has parameters: the adapters keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa.adapters.road import Road, RopeRoad
from rosa.adapters.roae import RoAE
from rosa.adapters.rows import Rows, Stack
from rosa.errors import UnsupportedModelError
from rosa_kernels import road, rope_roae, signals


class RoadByRow(nn.Module):
    """RoAd of a linear layer's output, each row by its own adapter: one launch, as with one adapter.

    Args:
        rows (Rows): the rows.
        roads (sequence of Road or None): of the adapters, in the order of `rows.adapters`; None for one that leaves
            this layer out.
    """

    def __init__(self, rows: Rows, roads: Sequence[Road | None]):
        super().__init__()
        like = next(road for road in roads if road is not None)
        self.before_rope, self.options = like.before_rope, like.options
        self._rows, self._index = rows, rows.index(like.theta.device)
        zero, one = torch.zeros_like(like.theta), torch.ones_like(like.alpha)
        self._theta = Stack([zero, *(zero if road is None else road.theta for road in roads)])
        self._alpha = Stack([one, *(one if road is None else road.alpha for road in roads)])

    @property
    def theta(self) -> Tensor:
        """The angles as a table, `[1 + adapters, numbers]`; the first are those of the identity."""
        return self._theta()

    @property
    def alpha(self) -> Tensor:
        """The scales, as `theta`."""
        return self._alpha()

    def forward(self, h: Tensor, inplace: bool = False) -> Tensor:
        """RoAd of the batch's outputs; shape and dtype as given, `inplace` as of Road's forward."""
        adapted = road(self._rows.by_row(h), self.theta, self.alpha, self._index, inplace=inplace, **self.options)
        return adapted.reshape(h.shape)


class RopeRoadByRow(RopeRoad):
    """RoAd of queries and keys, each row by its own adapter, then RoPE, in one launch.

    Args:
        rows, ropes: as those of `RoadByRow`.
    """

    def __init__(self, rows: Rows, ropes: Sequence[RopeRoad | None]):
        def by_row(which: int) -> RoadByRow | None:
            roads = [None if rope is None else rope.roads[which] for rope in ropes]
            return RoadByRow(rows, roads) if any(roads) else None

        super().__init__(next(rope for rope in ropes if rope is not None).layout, by_row(0), by_row(1))
        self._rows = rows

    def index(self, q: Tensor) -> Tensor:
        """The row of the tables for each sequence of the batch."""
        return self._rows.index(q.device, self._rows.repeats(q.shape[0]))


class RoaeByRow(RoAE):
    """RoAE of queries and keys, each row by its own adapter: the products of the signals are batched, and one launch
    does the rest.

    Args:
        rows, roaes: as those of `RoadByRow`. Rows without one have a W_up of zeros, and so no signal.
    """

    def __init__(self, rows: Rows, roaes: Sequence[RoAE | None]):
        nn.Module.__init__(self)  # whose weights are the adapters'
        like = next(roae for roae in roaes if roae is not None)
        self.alpha, self.layout, self.heads = like.alpha, like.layout, like.heads
        self._rows = rows
        of = dict(zip(rows.adapters, roaes, strict=True))
        self._weights = [
            None if first is None else _by_row([getattr(of.get(name), weight, None) for name in rows.names])
            for weight in ("down", "up", "gqa_down", "gqa_up")
            for first in [getattr(like, weight)]
        ]

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Enhanced queries and keys; the arguments are those of RoAE's forward."""
        turn = self.layout.heads_first
        q, k = rope_roae(
            self._arranged(q), self._arranged(k), *self.layout.pairwise(cos, sin),
            *self._signals(hidden_states.to(q.dtype)), **self._options,
        )  # fmt: skip
        return turn(q), turn(k)

    def _signals(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        weights = [None if stack is None else stack(hidden_states.dtype) for stack in self._weights]
        of_rows = signals(self._rows.by_row(hidden_states), *weights)
        return tuple(None if s is None else s.reshape(*hidden_states.shape[:2], -1) for s in of_rows)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"alpha={self.alpha}, layout={self.layout}"


BY_ROW = {Road: RoadByRow, RopeRoad: RopeRoadByRow, RoAE: RoaeByRow}


class NormByRow:
    """The forward of a norm whose weight each row has its own of, in the norm's own precision.

    Args:
        rows (Rows): the rows.
        norm (nn.Module): of the model.
        weights (sequence of Tensor): one for each row.

    Raises:
        UnsupportedModelError: the norm cannot be computed so.
    """

    def __init__(self, rows: Rows, norm: nn.Module, weights: Sequence[Tensor]):
        self._rows, self._norm, self._weights = rows, norm, Stack(weights)
        self._compute = _BY_HAND.get(type(norm).forward) or _broadcast
        if self._compute is _broadcast and not _broadcasts(norm):
            raise UnsupportedModelError(
                f"a {type(norm).__module__}.{type(norm).__name__} cannot have a weight for each row, which adapters "
                "that train it ask for: use adapters with train_norms=False, or one at a time"
            )

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The norm of a batch `[batch, ..., width]`."""
        weight = self._weights()
        out = self._compute(self._norm, weight[:, None], self._rows.by_row(x), *args, **kwargs).reshape(x.shape)
        return out.to(x.dtype) if weight.dtype != self._norm.weight.dtype else out


class _WithWeight:
    """A norm with another weight."""

    def __init__(self, norm: nn.Module, weight: Tensor):
        self.norm_itself, self.weight = norm, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.norm_itself, name)


def _broadcast(norm: nn.Module, weight: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The class's own code, which multiplies by the weight and so takes one of several rows too."""
    return type(norm).forward(_WithWeight(norm, weight), x, *args, **kwargs)


def _layer_norm(norm: nn.LayerNorm, weight: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), norm.normalized_shape, eps=norm.eps) * weight.to(wide)
    return (y if norm.bias is None else y + norm.bias.to(wide)).to(x.dtype)


def _rms_norm(norm: nn.RMSNorm, weight: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.rms_norm(x.to(wide), norm.normalized_shape, eps=norm.eps) * weight.to(wide)).to(x.dtype)


# The classes whose kernel takes one vector; in float32 and rounded once, as the kernel is.
_BY_HAND = {nn.LayerNorm.forward: _layer_norm, nn.RMSNorm.forward: _rms_norm}


@torch.no_grad()
def _broadcasts(norm: nn.Module) -> bool:
    """Whether the norm's own code gives with a weight a row what it gives with each alone, tried out."""
    device, width = norm.weight.device, norm.weight.shape[-1]
    x = torch.linspace(-1, 2, 3 * width, device=device).view(3, width)
    weights = torch.linspace(0.5, 1.5, 2 * width, device=device).view(2, width)
    try:
        apart = torch.stack([_broadcast(norm, weight, x) for weight in weights])
        together = _broadcast(norm, weights[:, None], x.expand(2, -1, -1))
    except Exception:  # whatever the class's code does with a weight of another shape
        return False
    return together.shape == apart.shape and torch.equal(together, apart) and not torch.equal(*together)


def _by_row(weights: Sequence[Tensor | None]) -> Stack:
    zeros = torch.zeros_like(next(weight for weight in weights if weight is not None))
    return Stack([zeros if weight is None else weight for weight in weights])
