"""DLS (Dynamic Layer Selection): an optimizer wrapper that trains a few decoder layers at a time."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from rosa.decoder import decoder_layers
from rosa.errors import UnsupportedModelError
from rosa.patching import trainable_parameters

MODES = ("skip", "mask")


class Selection(NamedTuple):
    """One selection: the step it was made at (from 1), the decoder layers chosen, whether by score (else at random),
    and the score of every layer that takes part."""

    step: int
    layers: tuple[int, ...]
    exploited: bool
    scores: tuple[float, ...]


class _Layer(NamedTuple):
    index: int
    parameters: list[nn.Parameter]  # those that the optimizer holds
    norms: tuple[nn.Parameter, nn.Parameter]  # weights of the norm before attention and of the norm before the MLP

    @property
    def score_only(self) -> list[nn.Parameter]:
        """Norm weights that are not trained, and get gradients for the score alone."""
        return [norm for norm in self.norms if not any(norm is p for p in self.parameters)]


class DynamicLayerSelection(torch.optim.Optimizer):
    """Wraps an optimizer so that only selected decoder layers train (Algorithm 1 of the paper).

    Every `interval` steps after `warmup_steps`, the top k = max(1, floor(k_ratio * layers)) layers by score are chosen
    with probability `p_exploit`, otherwise k layers at random; the choice masks that step's gradients already and holds
    until the next. Before the first selection all layers train. A layer outside the selection does not move: its
    gradients are None, so the wrapped optimizer neither decays it nor counts a step for it. Parameters outside the
    decoder layers always train.

    To schedulers, `Trainer`, Accelerate and GradScaler this is an optimizer: it shows the wrapped one's `param_groups`,
    `state` and `defaults`.

    Args:
        optimizer (Optimizer): the optimizer to wrap, built from parameters of `model`.
        model (nn.Module): any model with decoder layers; it need not be patched. Norms that are not trained get
            gradients at selection steps only, for their score.
        k_ratio (float): share of the layers to train, in (0, 1].
        interval (int): steps between selections, at least 1.
        warmup_steps (int): steps before selections may begin, at least 0.
        p_exploit (float): probability of choosing by score, in [0, 1].
        mode (str): "skip" freezes the other layers until the step before the next selection, so that their gradients
            are never computed; "mask" computes every gradient and drops the unwanted ones at once, as in the paper. The
            parameters take the same course either way, gradient clipping included. Under torch.compile, compile the
            decoder layers one by one for "skip" (`layer.compile()`): a model compiled as a whole, which is warned of,
            makes another graph at each selection.
        seed (int): of the generator that draws the selections; the same on every rank.

    Attributes:
        selected_layers (tuple of int): the layers that train now.
        scores (tuple of float): the score of every layer that takes part at the last selection; empty before it.
        history (list of Selection): all selections so far.
        layers (tuple of int): the decoder layers that take part, those with trainable parameters in the optimizer;
            `scores` follows their order.
        num_layers (int): how many they are.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range, or the optimizer holds no parameter
            of the decoder layers.
        UnsupportedModelError: no decoder layers, or norms without weights.
    """

    # GradScaler would otherwise hand its scale to this object, and the wrapped fused optimizer would never see it.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        k_ratio: float = 0.5,
        interval: int = 40,
        warmup_steps: int = 0,
        p_exploit: float = 0.8,
        mode: str = "skip",
        seed: int = 2333,
    ):
        _check(optimizer, k_ratio, interval, warmup_steps, p_exploit, mode, seed)
        self.optimizer = optimizer
        super().__setstate__({})  # hooks and profiling; Optimizer.__init__ would also build param_groups of its own
        self._layers = _layers(optimizer, model)
        self.interval, self.warmup_steps, self.p_exploit, self.mode = interval, warmup_steps, p_exploit, mode
        # The margin keeps products such as 0.29 * 100, one rounding below a whole number, on that number.
        self.k = max(1, math.floor(k_ratio * len(self._layers) + 1e-9))
        self.selected_layers = self.layers
        self.history: list[Selection] = []
        self._steps = 0
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._requires_grad = {norm: norm.requires_grad for layer in self._layers for norm in layer.norms}
        self._requires_grad |= {p: True for layer in self._layers for p in layer.parameters}
        self.unfreeze()
        if mode == "mask":
            self._drop_gradients_as_they_come()
        else:
            self._warn_of_whole_graphs(model)
        self._prepare_next_step()

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self._layers)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def scores(self) -> tuple[float, ...]:
        return self.history[-1].scores if self.history else ()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step over the selected layers; at a selection step it selects first.

        Args:
            closure (callable, optional): recomputes the loss and its gradients; called once.

        Returns:
            What the closure returned, or None.

        Raises:
            FloatingPointError: the gradient of a norm is not finite at a selection step. Nothing was changed.
            RuntimeError: no norm has a gradient at a selection step. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._selects(self._steps + 1):
            selection = self._select(self._steps + 1)
            self.history.append(selection)
            self.selected_layers = selection.layers
        for layer in self._layers:
            _drop_gradients(layer.score_only)
            if layer.index not in self.selected_layers:
                _drop_gradients(layer.parameters)
        self.optimizer.step()
        self._steps += 1
        self._prepare_next_step()
        return loss

    def unfreeze(self) -> None:
        """Gives every parameter the requires_grad flag it had at first; the next `step` freezes again."""
        for parameter, flag in self._requires_grad.items():
            parameter.requires_grad_(flag)
        self._holds = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all that the optimizer holds, and of norms that serve the score alone."""
        super().zero_grad(set_to_none)
        for layer in self._layers:
            _drop_gradients(layer.score_only)

    def _selects(self, step: int) -> bool:
        return step > self.warmup_steps and step % self.interval == 0

    def _select(self, step: int) -> Selection:
        scores = self._score(step)
        exploit = bool(torch.rand((), generator=self._generator, device="cpu") < self.p_exploit)
        if exploit:
            ranked = sorted(range(len(scores)), key=lambda i: -scores[i])  # the lower of two equal layers comes first
        else:
            ranked = torch.randperm(len(scores), generator=self._generator, device="cpu").tolist()
        layers = tuple(sorted(self._layers[i].index for i in ranked[: self.k]))
        return Selection(step, layers, exploit, scores)

    def _score(self, step: int) -> tuple[float, ...]:
        """Eq. 5: sqrt(|grad attn norm|^2 + |grad ffn norm|^2) of every layer; a layer that took no part scores 0."""
        squares, device = [], self._layers[0].norms[0].device
        for layer in self._layers:
            grads = [norm.grad for norm in layer.norms if norm.grad is not None]
            squares.append(sum((g.float().square().sum().to(device) for g in grads), torch.zeros((), device=device)))
        if all(norm.grad is None for layer in self._layers for norm in layer.norms):
            raise RuntimeError(f"step {step} selects layers, but no norm has a gradient: call backward() before step()")
        scores = tuple(torch.stack(squares).sqrt().tolist())
        for layer, score in zip(self._layers, scores, strict=True):
            if not math.isfinite(score):
                raise FloatingPointError(f"the gradients of layer {layer.index}'s norms are not finite at step {step}")
        return scores

    def _prepare_next_step(self) -> None:
        """At a selection step every layer computes gradients, since any may be chosen."""
        selects = self._selects(self._steps + 1)
        for layer in self._layers:
            trains = selects or self.mode == "mask" or layer.index in self.selected_layers
            for parameter in layer.parameters:
                parameter.requires_grad_(trains)
            for norm in layer.score_only:
                norm.requires_grad_(selects)
        self._holds = True

    def _drop_gradients_as_they_come(self) -> None:
        """Gradient clipping between backward and step must see what it sees in mode "skip": the selected layers."""
        reference = weakref.ref(self)  # the parameters, which keep the hooks, may outlive this optimizer

        def drop(index: int, parameter: nn.Parameter) -> None:
            selection = reference()
            if selection is not None and selection._drops(index):
                parameter.grad = None

        for layer in self._layers:
            for parameter in layer.parameters:
                parameter.register_post_accumulate_grad_hook(functools.partial(drop, layer.index))

    def _warn_of_whole_graphs(self, model: nn.Module) -> None:
        """Warns when the module that runs the layers, and so all of them at once, goes into one graph."""
        name = decoder_layers(model)[0].name.rpartition(".")[0]  # of the list of layers
        runs_layers = model.get_submodule(name.rpartition(".")[0])
        weakref.finalize(self, runs_layers.register_forward_pre_hook(_warn_if_compiling).remove)

    def _drops(self, index: int) -> bool:
        return self._holds and index not in self.selected_layers and not self._selects(self._steps + 1)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "layer_selection", the step, the selection and its generator."""
        own = {
            "step": self._steps,
            "selected_layers": list(self.selected_layers),
            "history": [tuple(selection) for selection in self.history],
            "generator": self._generator.get_state(),
            "num_layers": self.num_layers,
        }
        return {**self.optimizer.state_dict(), "layer_selection": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave: the run goes on as if it had not stopped.

        Raises:
            ValueError: the state has no layer selection, or one over another number of layers. Nothing was changed.
        """
        own = state_dict.get("layer_selection")
        if own is None:
            raise ValueError(
                "this state has no 'layer_selection': it is of an optimizer without DLS; load it into `.optimizer`"
            )
        if own["num_layers"] != self.num_layers:
            raise ValueError(f"this state selects among {own['num_layers']} layers, the model has {self.num_layers}")
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "layer_selection"})
        self._steps = own["step"]
        self.selected_layers = tuple(own["selected_layers"])
        self.history = [Selection(s, tuple(layers), e, tuple(scores)) for s, layers, e, scores in own["history"]]
        self._generator.set_state(own["generator"].cpu())
        self._prepare_next_step()

    # To everyone who asks, the wrapped optimizer's groups, state and defaults are this one's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> dict:
        return self.optimizer.state

    @state.setter
    def state(self, state: dict) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer. Its parameters always train: the layers were fixed at construction."""
        self.optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # What some optimizers have beyond the common interface, such as `train` and `eval` of schedule-free ones.
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__  # Optimizer's own takes what only the wrapped optimizer has

    def __repr__(self) -> str:
        return f"DynamicLayerSelection(k={self.k} of {self.num_layers}, mode={self.mode!r}, {self.optimizer!r})"


def _layers(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[_Layer]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held &= {id(p) for p in trainable_parameters(model)}  # an optimizer may hold a frozen base too
    layers = []
    for index, layer in enumerate(decoder_layers(model)):
        parameters = [p for p in layer.module.parameters() if id(p) in held]
        norms = tuple(getattr(norm, "weight", None) for norm in layer.scored_norms)
        if any(weight is None for weight in norms):
            raise UnsupportedModelError(
                f"{layer.name} of {type(model).__name__} has norms without weights: there is nothing to rank layers by"
            )
        if parameters:
            layers.append(_Layer(index, parameters, norms))
    if not layers:
        raise ValueError(
            "the optimizer holds no parameter of the model's decoder layers, so freezing them would have no effect; "
            "build it from this model's parameters, for example rosa.trainable_parameters(model)"
        )
    return layers


def _warn_if_compiling(module: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():
        _warn_of_whole_graph()


@torch.compiler.assume_constant_result  # torch.compile runs it when it makes a graph, not when the graph runs
def _warn_of_whole_graph() -> None:
    _warn_once(
        "DynamicLayerSelection(mode='skip') in a model that is compiled as a whole: every selection changes which "
        "parameters require gradients and makes another graph, until torch.compile reaches its recompile_limit and "
        "runs the model uncompiled. Compile each decoder layer on its own instead (regional compilation: "
        "`for layer in model.model.layers: layer.compile()`), or use mode='mask'"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _check(optimizer, k_ratio, interval, warmup_steps, p_exploit, mode, seed) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, DynamicLayerSelection):
        raise TypeError("optimizer is a DynamicLayerSelection already; wrap the optimizer inside it")
    for name, value in (("interval", interval), ("warmup_steps", warmup_steps), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not 0 < k_ratio <= 1:
        raise ValueError(f"k_ratio must lie in (0, 1], got {k_ratio}")
    if interval < 1:
        raise ValueError(f"interval must be at least 1 step, got {interval}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    if not 0 <= p_exploit <= 1:
        raise ValueError(f"p_exploit must lie in [0, 1], got {p_exploit}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
