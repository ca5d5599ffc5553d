"""The rows of a batch that have adapters of their own: which row is whose, and the adapters' weights in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rosa.errors import UnsupportedModelError


class Rows:
    """Which adapter each row of a batch has.

    A batch may hold each row several times, one after the other, as `generate` lays out beams and sequences to return.
    What is told here of a batch is told by its shape: nothing waits for a device.

    Args:
        names (sequence of str or None): an adapter's name for each row, None for the base.
    """

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.adapters = tuple(dict.fromkeys(name for name in names if name is not None))
        self._count = len(self.names)  # for torch.compile, whose graph is then one for all rows of this number
        self._slots = [0 if name is None else 1 + self.adapters.index(name) for name in names]
        self._indices: dict[tuple[torch.device, int], Tensor] = {}
        self._tokens: int | None = None  # of the batch that a decoder layer computes

    def index(self, device: torch.device, repeats: int = 1) -> Tensor:
        """The slot of each row, int32: 0 for the base, then the adapters in order; each row `repeats` times."""
        if torch.compiler.is_compiling() and repeats > 1:
            return self.index(device).repeat_interleave(repeats)
        if (device, repeats) not in self._indices:
            with torch.inference_mode(False):
                made = torch.tensor(self._slots, dtype=torch.int32, device=device)
                self._indices[device, repeats] = made.repeat_interleave(repeats)
        return self._indices[device, repeats]

    def repeats(self, batch: int) -> int:
        """How often a batch of this size holds each row.

        Raises:
            ValueError: it is no multiple of the rows.
        """
        if batch < 1 or batch % self._count:
            raise ValueError(
                f"rosa.adapters_by_row was given {self._count} rows and the model a batch of {batch}: it must be "
                "as many, or a multiple of them, where beams or sequences to return repeat each row"
            )
        return batch // self._count

    def by_row(self, x: Tensor) -> Tensor:
        """A tensor of the batch, `[batch, ..., width]` or the tokens of all rows `[batch * seq, width]`, as
        `[rows, ..., width]` with three dimensions.

        Raises:
            ValueError: the batch is no multiple of the rows.
            UnsupportedModelError: it is neither.
        """
        if x.dim() < 3 and (torch.compiler.is_compiling() or x.shape[0] != self._tokens):
            raise UnsupportedModelError(
                f"a layer of this model computes {x.shape[0]} tokens without their rows, as layers of experts do: "
                "rosa.adapters_by_row cannot tell whose they are. Leave that layer out of the adapters' targets"
            )
        self.repeats(x.shape[0])
        return x.reshape(self._count, -1, x.shape[-1])

    def watch(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of a decoder layer: sees the batch, and raises as `repeats` does."""
        if torch.compiler.is_compiling():
            return  # what follows is traced for one batch
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if hidden_states.dim() == 3:  # several streams of a batch are in a dimension before it (Gemma 3n) or behind it
            self.repeats(hidden_states.shape[0])
        self._tokens = hidden_states.shape[:2].numel()


class Stack:
    """Weights of several adapters in one tensor, `[weights, ...]`: made anew where they get gradients, so that each has
    its own, and kept where they get none, until one changes. What is written through a weight's `.data` is seen after
    the next pass that gets gradients.

    Args:
        weights (sequence of Tensor): of one shape; where their dtypes differ, the tensor has the widest.
    """

    def __init__(self, weights: Sequence[Tensor]):
        self._weights = tuple(weights)
        self._kept: tuple[list[int], torch.dtype | None, Tensor] | None = None

    def __call__(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, of another dtype if one is given."""
        if torch.compiler.is_compiling():
            return self._stacked(dtype)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self._weights):
            self._kept = None  # an optimizer's step may follow that counts no version, as bitsandbytes' does
            return self._stacked(dtype)
        versions = [weight._version for weight in self._weights]
        if self._kept is None or self._kept[:2] != (versions, dtype):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = versions, dtype, self._stacked(dtype)
        return self._kept[2]

    def _stacked(self, dtype: torch.dtype | None) -> Tensor:
        stacked = torch.stack(self._weights)
        return stacked if dtype is None else stacked.to(dtype)
