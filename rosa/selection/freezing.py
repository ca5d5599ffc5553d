"""Freezing: which of an optimizer's parameters in the decoder layers require gradients now, and keep those they get."""

from __future__ import annotations

import functools
import operator
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rosa.adapters.record import is_patched, patched
from rosa.selection import engines
from rosa.selection.algorithm import Selector
from rosa.selection.forward import watch_forward
from rosa.selection.scored_layers import ScoredLayer, holders, is_among, score_layers, scored_layers
from rosa.selection.zero import Zero

MODES = ("skip", "mask")


class Freezing:
    """Freezes and masks what an optimizer holds of a model's decoder layers; `bind` finds it.

    Args:
        optimizer, model, mode, score: as of `DynamicLayerSelection`.

    Attributes:
        choice (Selector or None): whose selected layers alone train; None while all do.
        engine (Engine): of several processes, as far as it has shown.
        held (list of Parameter): what the optimizer held when `bind` last found the layers' among it.
        succeeded (bool): a later selection has taken over these layers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, mode: str, score: str):
        self.optimizer, self.model, self.mode, self.score = optimizer, model, mode, score
        self.adapter = patched(model)[1].active_adapter if is_patched(model) else None
        self.engine = engines.Engine()
        self.choice: Selector | None = None
        self.succeeded = self.forward_seen = False
        self._layers: list[ScoredLayer] = []
        self.held: list[nn.Parameter] = []
        self._holders: dict[nn.Parameter, set[int]] = {}
        self._elsewhere: list[tuple[nn.Parameter, torch.Tensor]] = []  # another's, with gradients from before this step

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self._layers)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer holds of the layers that take part."""
        return [*self._holders]

    @property
    def adapter_is_away(self) -> bool:
        """Whether the norms hold another adapter's weights now, or the base's."""
        return self.adapter is not None and not self.adapter.attached

    def held_by_optimizer(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def hold(self, choice: Selector) -> None:
        """Readies the layers for the next step under this choice. If that step selects, every layer computes gradients,
        since any may be chosen."""
        selects, freezes = choice.selects_next, self._may_freeze()
        self._set_flags(choice.selected_layers if freezes and not selects else self.layers, score_only=selects)
        elsewhere = [p for layer in self._layers for p in layer.elsewhere] if selects else []
        self._elsewhere = [(p, p.grad) for p in elsewhere if p.grad is not None]
        self.choice = choice

    def unfreeze(self) -> None:
        """Gives every parameter the requires_grad flag it had at first, until the next `hold`."""
        self._set_flags(self.layers, score_only=False)
        self.choice = None

    def drop_gradients_outside(self, selected: tuple[int, ...]) -> None:
        """Leaves the wrapped optimizer no gradient of a layer that is not selected, nor of what served the score."""
        self.drop_score_only_gradients()
        _drop_gradients(p for p, layers in self._holders.items() if layers.isdisjoint(selected))

    def drop_score_only_gradients(self) -> None:
        _drop_gradients(self._score_only)

    def scores(self, step: int) -> tuple[float, ...]:
        """The layers' scores from the gradients of this step, as `score_layers` has them."""
        if any(p.grad is gradient for p, gradient in self._elsewhere):
            _warn_once(
                "norms that DynamicLayerSelection reads for its score, and does not train, kept their gradients from "
                "one step to the next: unless they are cleared in place, the scores add up. Clear them at every step, "
                "as the optimizer that trains them does (model.zero_grad()), or give them to this one"
            )
        return score_layers(self._layers, self.engine, self.score, step)

    def bind(self) -> None:
        """Finds the layers' parameters among the optimizer's; again where a group has come since, or FSDP2 has put
        shards in their place."""
        held = self.held_by_optimizer()
        if self._layers and len(held) == len(self.held) and all(map(operator.is_, held, self.held)):
            return
        if self._layers and not any(is_among(p, self.model.parameters()) for p in held):
            self._bind_to_zero()
            return
        if self._layers:
            self.unfreeze()
            for norm in self._score_only:
                norm.requires_grad_(is_among(norm, held) and not is_among(norm, self.held))
        earlier = self._layers
        self._layers, self.held = scored_layers(self.optimizer, self.model, self.score, earlier), held
        self._drop_gradients_as_they_come({p for layer in earlier for p in layer.parameters})
        engine = engines.engine_of(self.model, self._layers[0].parameters[0])
        if engine is not None:
            self.engine = engine
        for layer in self._layers:
            self.engine.check_layer(layer.parameters + layer.scored)

    def watch_forward(self) -> None:
        """Notes every forward from now on, as long as this object lives."""
        reference = weakref.WeakMethod(self._note_forward)  # the model, which keeps the hook, may outlive it

        def note(compiles: bool) -> None:
            note_forward = reference()
            if note_forward is not None:
                note_forward(compiles)

        weakref.finalize(self, watch_forward(self.model, note).remove)

    @property
    def _score_only(self) -> list[nn.Parameter]:
        return [p for layer in self._layers for p in layer.score_only]

    def _may_freeze(self) -> bool:
        """In several processes not before a forward: until then, an engine may wrap or shard the model, and looks at
        the flags when it does."""
        if self.mode == "mask" or (dist.is_initialized() and not self.forward_seen):
            return False
        obstacle = self.engine.obstacle()
        if obstacle is not None:
            _warn_once(f"DynamicLayerSelection(mode='skip') works as mode='mask' here: {obstacle}")
        return obstacle is None

    def _set_flags(self, layers: tuple[int, ...], *, score_only: bool) -> None:
        """Lets the parameters of these layers require gradients and no others, and norms that serve the score alone
        only with `score_only`."""
        flags = {p: not holders.isdisjoint(layers) for p, holders in self._holders.items()}
        changed = any(p.requires_grad != flag for p, flag in flags.items())
        for parameter, flag in (flags | dict.fromkeys(self._score_only, score_only)).items():
            parameter.requires_grad_(flag)
        if changed:
            self.engine.flags_changed()

    def _bind_to_zero(self) -> None:
        """The optimizer holds none of the model's parameters any more: DeepSpeed has put tensors of its own there."""
        if not isinstance(self.engine, Zero):
            elsewhere = [p for layer in self._layers for p in layer.elsewhere]
            groups = self.optimizer.param_groups
            self.engine = Zero(groups, self.score, self.parameters, self._score_only, elsewhere)

    def _drop_gradients_as_they_come(self, watched: set[nn.Parameter]) -> None:
        """Gradient clipping between backward and step sees the selected layers only, also where others are not frozen.
        At a step that selects it sees all layers, and of norms that nobody trains those that are scored: which layers
        are dropped is known in step() alone. `watched` are seen to already."""
        reference = weakref.ref(self)  # the parameters, which keep the hooks, may outlive this object

        def drop(layers: set[int], parameter: nn.Parameter) -> None:
            freezing = reference()
            if freezing is not None and freezing._drops(layers):
                freezing.engine.drop(parameter)

        self._holders = holders(self._layers)
        for parameter, layers in self._holders.items():
            parameter.requires_grad_(True)  # an optimizer that is gone may have left it frozen
            if parameter not in watched:
                parameter.register_post_accumulate_grad_hook(functools.partial(drop, layers))

    def _drops(self, layers: set[int]) -> bool:
        if self.choice is None or self.adapter_is_away:
            return False
        return layers.isdisjoint(self.choice.selected_layers) and not self.choice.selects_next

    def _note_forward(self, compiles: bool) -> None:
        """Notes whether DDP runs it; in mode "skip" warns where all layers go into one graph."""
        if torch.is_grad_enabled():
            self.forward_seen = True
            ddp = engines.running_ddp()
            if ddp is not None and ddp is not getattr(self.engine, "ddp", None):
                self.engine = engines.DDP(ddp)
        if compiles and self.mode == "skip":
            _warn_once(
                "DynamicLayerSelection(mode='skip') in a model that is compiled as a whole: every selection changes "
                "which parameters require gradients and makes another graph, until torch.compile reaches its "
                "recompile_limit and runs the model uncompiled. Compile each decoder layer on its own instead "
                "(regional compilation: `for layer in model.model.layers: layer.compile()`), or use mode='mask'"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy would copy the whole model too.
        return {**self.__dict__, "adapter": None, "model": None, "engine": engines.Engine()}


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
