"""Composition (RoAd's paper, section 4): RoAd_1 behind decoder layers, its pairs divided among named tasks.

Each task owns a share of the pairs of the hidden width, a mask m: R_m = m R + (1 - m) I. The tasks are trained
together, each row of a batch under its own task's mask. At inference a row takes one task, several (the union of their
masks), or none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.adapters.record import COMPOSED
from rosa.composition.division import Division, plan_division
from rosa.composition.pair_rotation import PairRotation, Turned
from rosa.composition.prompt_tokens import prompt_tokens
from rosa.models.decoder import decoder_layers

MODULE_NAME = "composition"


def compose(
    model: nn.Module,
    tasks: Sequence[str] | Mapping[str, int],
    layers: int | Sequence[int] | None = None,
    positions: int | str = 1,
) -> nn.Module:
    """Adds one rotation of pairs behind each of some decoder layers, divided among tasks, and freezes the rest.

    The model computes what it computed before until it is trained, and wherever no task is chosen: see `use_tasks` and
    `tasks_by_row`.

    Args:
        model (PreTrainedModel): of transformers, not wrapped, without other adapters of RoSA's.
        tasks (sequence of str, or mapping of str to int): their names, for equal shares of the pairs of the hidden
            width; or the number of pairs of each.
        layers (int or sequence of int, optional): the decoder layers whose outputs are turned, from 0. None takes the
            middle one, as the paper does.
        positions (int or "all"): how many tokens at the end of each prompt are turned, the paper's one by default; or
            all tokens, those of the answers too.

    Returns:
        The same model.

    Raises:
        ValueError: the pairs do not divide among the tasks, there is no such layer, `positions` does not fit, or the
            model carries adapters of RoSA's already.
        UnsupportedModelError: the model has no decoder layers, or an odd hidden width.
        Nothing is changed after an error.
    """
    division = plan_division(model, tasks, layers, positions)
    found = decoder_layers(model)
    record = Composition(division, {name: p.requires_grad for name, p in model.named_parameters()})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for number in division.layers:
        layer = found[number].module
        record.rotations[number] = PairRotation(division.pairs, next(layer.parameters()).device)
        layer.add_module(MODULE_NAME, record.rotations[number])
        record.hooks.append(layer.register_forward_hook(record.turn))
    record.hooks.append(model.register_forward_pre_hook(record.begin, with_kwargs=True))
    record.hooks.append(model.register_forward_hook(record.end, always_call=True))
    setattr(model, COMPOSED, record)
    torch.compiler.reset()  # it does not look again for hooks of a module that it made a graph of
    return model


def decompose(model: nn.Module) -> nn.Module:
    """Takes off what `compose` added: its modules and hooks; requires_grad flags are as before.

    Raises:
        ValueError: the model is not composed, or parameters were renamed since. Nothing is changed then.
    """
    owner, record = composed(model)
    parameters = dict(owner.named_parameters())
    renamed = next((name for name in record.requires_grad if name not in parameters), None)
    if renamed is not None:
        raise ValueError(f"{renamed} has another name since the model was composed: undo what renamed it first")
    for hook in record.hooks:
        hook.remove()
    for module in [m for m in owner.modules() if MODULE_NAME in m._modules]:
        delattr(module, MODULE_NAME)
    for name, flag in record.requires_grad.items():
        parameters[name].requires_grad_(flag)
    delattr(owner, COMPOSED)
    torch.compiler.reset()
    return model


def composition_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The angles and scales of a composed model by full name: all that it trains.

    Raises:
        ValueError: the model is not composed.
    """
    ours = [(name, m) for name, m in composed(model)[0].named_modules() if isinstance(m, PairRotation)]
    return {f"{name}.{p}": parameter for name, module in ours for p, parameter in module.named_parameters()}


@contextmanager
def use_tasks(model: nn.Module, *tasks: str, prompt_lengths: Sequence[int] | None = None) -> Iterator[nn.Module]:
    """A block in which every row is computed with these tasks: one, the union of several, or with none the base.

    Args:
        model (nn.Module): a composed model, wrapped or not.
        tasks (str): their names.
        prompt_lengths (sequence of int, optional): tokens of each row's prompt, without padding. They are needed only
            where neither labels nor an empty cache tell: to generate without a cache, or to go on with a filled one.

    Raises:
        KeyError: the model has no such task.
        ValueError: the model is not composed, or a length is below 1.
    """
    with _chosen(model, tasks, prompt_lengths):
        yield model


@contextmanager
def tasks_by_row(
    model: nn.Module,
    tasks: Sequence[str | Sequence[str] | None],
    *,
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[nn.Module]:
    """A block in which each row of a batch is computed with its own tasks.

    Args:
        model (nn.Module): a composed model, wrapped or not.
        tasks (sequence): for each row the name of a task, a tuple of several, or None for the base. In `generate` a row
            repeats with its beams.
        prompt_lengths (sequence of int, optional): as for `use_tasks`.

    Raises:
        KeyError: the model has no such task.
        ValueError: the model is not composed, there are no rows, or a length is below 1. The model's forward raises it
            for a batch with another number of rows.
    """
    if isinstance(tasks, str) or not len(tasks):
        raise ValueError(f"tasks must give every row its task, got {tasks!r}")
    rows = [() if row is None else (row,) if isinstance(row, str) else tuple(row) for row in tasks]
    with _chosen(model, rows, prompt_lengths):
        yield model


@dataclass
class Composition:
    """What `compose` did to a model, kept on it; and what the pass that is running turns."""

    division: Division
    requires_grad: dict[str, bool]  # of every parameter, before
    rotations: dict[int, PairRotation] = field(default_factory=dict)  # by the number of their layer
    hooks: list[RemovableHandle] = field(default_factory=list)
    masks: Tensor | None = None  # of all rows, bool `[pairs]`, or of each, `[rows, pairs]`; None for the base
    prompt_lengths: Tensor | None = None
    turned: Turned | None = None  # None while the model is not running

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the model's forward: finds the tokens to turn."""
        if self.masks is None:
            return
        given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        rows, beams = tokens.shape[0], given.get("labels") is None
        masks, lengths = self.masks.to(tokens.device), self.prompt_lengths
        masks = masks.expand(rows, -1) if masks.dim() == 1 else _for_rows(masks, rows, "tasks", beams)
        if lengths is not None:
            lengths = _for_rows(lengths.to(tokens.device), rows, "prompt_lengths", beams)
        found = prompt_tokens(given, self.division.positions, lengths, training=model.training)
        row, column = (found & masks.any(1, keepdim=True)).nonzero(as_tuple=True)
        self.turned = Turned(masks, row, column)

    def turn(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        """After a decoder layer's forward: turns the tokens."""
        if self.masks is None:
            return output
        if self.turned is None:
            raise RuntimeError(
                "tasks are chosen, but the composed model itself is not running: call the model that rosa.compose was "
                "given, not a part of it, and do not checkpoint around its decoder layers"
            )
        if not len(self.turned.row):
            return output
        if isinstance(output, Tensor):
            return getattr(layer, MODULE_NAME)(output, self.turned)
        return (getattr(layer, MODULE_NAME)(output[0], self.turned), *output[1:])

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        """After the model's forward, also one that failed."""
        self.turned = None


def is_composed(model: nn.Module) -> bool:
    """Whether the model, or one that it wraps, carries a composition."""
    return any(COMPOSED in module.__dict__ for module in model.modules())


def composed(model: nn.Module) -> tuple[nn.Module, Composition]:
    """The composed model, which may stand inside wrappers such as DDP, and its record.

    Raises:
        ValueError: the model is not composed.
    """
    for module in model.modules():
        if COMPOSED in module.__dict__:
            return module, module.__dict__[COMPOSED]
    raise ValueError(f"this {type(model).__name__} is not composed; call rosa.compose(model, tasks) first")


@contextmanager
def _chosen(
    model: nn.Module, tasks: tuple[str, ...] | list[tuple[str, ...]], prompt_lengths: Sequence[int] | None
) -> Iterator[None]:
    """A block in which all rows have these tasks, or those of a list each its own."""
    record = composed(model)[1]
    mask = record.division.mask
    masks = torch.stack([mask(row) for row in tasks]) if isinstance(tasks, list) else mask(tasks) if tasks else None
    if prompt_lengths is not None and not all(int(length) >= 1 for length in prompt_lengths):
        raise ValueError(f"prompt_lengths must be numbers of tokens, at least 1, got {list(prompt_lengths)}")
    lengths = None if prompt_lengths is None else torch.as_tensor(prompt_lengths, dtype=torch.long)
    before = record.masks, record.prompt_lengths
    record.masks, record.prompt_lengths = masks, lengths
    try:
        yield
    finally:
        record.masks, record.prompt_lengths = before


def _for_rows(given: Tensor, rows: int, what: str, beams: bool) -> Tensor:
    """What was given for each row, repeated as `generate` repeats a row for its beams."""
    if rows != len(given) and (not beams or rows % len(given)):
        raise ValueError(f"{what} are given for {len(given)} rows, but the batch has {rows}")
    return given.repeat_interleave(rows // len(given), 0)
