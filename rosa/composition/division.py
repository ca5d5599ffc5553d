"""How `compose` divides a model: which pairs belong to which task, behind which layers, at which tokens. All that can
fail of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rosa.adapters.record import is_patched
from rosa.composition.pair_rotation import PairRotation
from rosa.errors import UnsupportedModelError
from rosa.models.decoder import decoder_layers
from rosa.models.trainable import refuse_inference_mode, refuse_layers_without_backward

ALL = "all"


class Division(NamedTuple):
    """A composition that fits a model."""

    shares: dict[str, int]  # pairs of each task, which own them in this order
    layers: tuple[int, ...]  # from 0, ascending
    positions: int | str  # tokens at the end of the prompt, or "all"
    width: int  # of the hidden states
    depth: int  # decoder layers of the model

    @property
    def pairs(self) -> int:
        return self.width // 2

    def mask(self, tasks: Sequence[str]) -> Tensor:
        """The pairs that some tasks own together, bool `[pairs]`.

        Raises:
            KeyError: there is no such task.
        """
        unknown = next((task for task in tasks if task not in self.shares), None)
        if unknown is not None:
            raise KeyError(f"this model has no task {unknown!r}; it has {', '.join(self.shares)}")
        return torch.cat([torch.full((pairs,), name in tasks) for name, pairs in self.shares.items()])


def plan_division(
    model: nn.Module,
    tasks: Sequence[str] | Mapping[str, int],
    layers: int | Sequence[int] | None,
    positions: int | str,
) -> Division:
    """The division that `compose` makes, which documents the arguments and what is raised; nothing is changed yet."""
    _refuse_unfit(model)
    depth = len(decoder_layers(model))
    width = model.config.get_text_config().hidden_size
    if width % 2:
        raise UnsupportedModelError(
            f"the hidden width of this {type(model).__name__} is {width}, which is odd: it has no pairs to turn"
        )
    numbers = [depth // 2] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if not numbers or not all(type(n) is int and 0 <= n < depth for n in numbers):
        raise ValueError(f"layers must be among 0 to {depth - 1} in this {type(model).__name__}, got {layers!r}")
    if positions != ALL and (type(positions) is not int or positions < 1):
        raise ValueError(
            f'positions must be "{ALL}" or a number of tokens at the end of the prompt, at least 1, got {positions!r}'
        )
    return Division(_shares(tasks, width // 2), tuple(sorted(set(numbers))), positions, width, depth)


def _refuse_unfit(model: nn.Module) -> None:
    from transformers import PreTrainedModel  # takes seconds, and by now it has been imported

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"rosa.compose takes a model of transformers, not a {type(model).__name__}: compose before you wrap it"
        )
    composed = next((name for name, module in model.named_modules() if isinstance(module, PairRotation)), None)
    if composed is not None:  # a part of a composed model too
        raise ValueError(f"this {type(model).__name__} is composed already, at {composed}: rosa.decompose it first")
    if is_patched(model):
        raise ValueError(
            f"this {type(model).__name__} carries an adapter of rosa.patch, and composition stands by itself: "
            "rosa.unpatch it first"
        )
    refuse_inference_mode(model)
    refuse_layers_without_backward(model)


def _shares(tasks: Sequence[str] | Mapping[str, int], pairs: int) -> dict[str, int]:
    names = list(tasks)
    if isinstance(tasks, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"tasks must be names, or names with their numbers of pairs, got {tasks!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"a task has its name twice in {names}")
    if not isinstance(tasks, Mapping):
        if pairs % len(names):
            raise ValueError(
                f"{pairs} pairs do not divide among {len(names)} tasks: say how many each has, as in "
                f"{{{names[0]!r}: {pairs // len(names)}, ...}}"
            )
        return dict.fromkeys(names, pairs // len(names))
    if not all(type(share) is int and share > 0 for share in tasks.values()) or sum(tasks.values()) != pairs:
        raise ValueError(f"the tasks' shares must be whole numbers above 0 with the sum {pairs}, got {dict(tasks)}")
    return dict(tasks)
