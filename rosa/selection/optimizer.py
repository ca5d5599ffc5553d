"""DLS (Dynamic Layer Selection): an optimizer wrapper that trains a few decoder layers at a time."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from rosa.adapters.record import is_patched, patched
from rosa.models.decoder import decoder_layers
from rosa.models.sharding import shard_state, whole_state
from rosa.selection import engines
from rosa.selection.scored_layers import SCORES, holders, is_among, scored_layers
from rosa.selection.zero import Zero

MODES = ("skip", "mask")

_living: weakref.WeakSet[DynamicLayerSelection] = weakref.WeakSet()


class Selection(NamedTuple):
    """One selection: the step it was made at (from 1), the decoder layers chosen, whether by score (else at random),
    and the score of every layer that takes part."""

    step: int
    layers: tuple[int, ...]
    exploited: bool
    scores: tuple[float, ...]


class _Watch:
    """A forward pre-hook that belongs to one optimizer: copies and pickles of the model go without it."""

    def __init__(self, watch: Callable[[nn.Module, tuple], None]):
        self._watch = watch

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self._watch(module, args)

    def __reduce__(self) -> tuple:
        return functools.partial, (_unwatched,)


def _unwatched(module: nn.Module, args: tuple) -> None:
    """What a copy of the model has instead."""


class DynamicLayerSelection(torch.optim.Optimizer):
    """Wraps an optimizer so that only selected decoder layers train (Algorithm 1 of the paper).

    Every `interval` steps after `warmup_steps`, the top k = max(1, floor(k_ratio * layers)) layers by score are chosen
    with probability `p_exploit`, otherwise k layers at random; the choice masks that step's gradients already and holds
    until the next. Before the first selection all layers train. A layer outside the selection does not move: its
    gradients are None, so the wrapped optimizer neither decays it nor counts a step for it. Parameters outside the
    decoder layers always train; what several layers share trains while one of them is selected.

    What another optimizer holds, as AdamW the norms beside Muon, is that one's alone to train and to clear: here it is
    only read, for the score. So call this `step` before the other's `zero_grad`. One model has one layer selection: to
    select for two optimizers' parameters, give both groups to one optimizer, or wrap one and leave the other plain.

    To schedulers, `Trainer`, Accelerate and GradScaler this is an optimizer: it shows the wrapped one's `param_groups`,
    `state` and `defaults`.

    In several processes all ranks select what the first one does, from the reduced gradients. Under DDP only the
    gradients of layers that train cross the network in mode "skip"; under FSDP2 (`fully_shard`) too. The model may be
    wrapped before or after this optimizer is made. Where layers cannot be frozen, "skip" says so and works as "mask".

    Args:
        optimizer (Optimizer): the optimizer to wrap, built from parameters of `model`; none whose `step` needs a
            closure, as LBFGS has it.
        model (nn.Module): any model with decoder layers, inside DistributedDataParallel or not; it need not be patched.
            Norms that require no gradients now, and are in no later group, get them at selection steps only, for their
            score.
        k_ratio (float): share of the layers to train, in (0, 1].
        interval (int): steps between selections, at least 1.
        warmup_steps (int): steps before selections may begin, at least 0.
        p_exploit (float): probability of choosing by score, in [0, 1].
        mode (str): "skip" freezes the other layers until the step before the next selection, so that their gradients
            are never computed; "mask" computes every gradient and drops the unwanted ones at once, as in the paper. The
            parameters take the same course either way, gradient clipping included. Under torch.compile, compile the
            decoder layers one by one for "skip" (`layer.compile()`): a model compiled as a whole, which is warned of,
            makes another graph at each selection.
        score (str): "norms" ranks layers by the gradients of their norms (Eq. 5); "adapter" by those of all that the
            optimizer holds of the layer but its norms, for models whose norms have no weights.
        seed (int): of the generator that draws the selections, from -2**63 to 2**64 - 1; of several processes, the
            first one's counts.

    Attributes:
        selected_layers (tuple of int): the layers that train now.
        scores (tuple of float): the score of every layer that takes part at the last selection; empty before it.
        history (list of Selection): all selections so far.
        layers (tuple of int): the decoder layers that take part, those with trainable parameters in the optimizer;
            `scores` follows their order.
        num_layers (int): how many they are.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range, or the optimizer holds no parameter
            of the decoder layers, or lacks some that an earlier selection has frozen for the moment, or another
            selection is at work on these layers.
        UnsupportedModelError: no decoder layers, norms without weights, or a model sharded by FSDP1.
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
        score: str = "norms",
        seed: int = 2333,
    ):
        _check(optimizer, k_ratio, interval, warmup_steps, p_exploit, mode, score, seed)
        self.optimizer = optimizer
        super().__setstate__({})  # hooks and profiling; Optimizer.__init__ would also build param_groups of its own
        self._adapter = patched(model)[1].active_adapter if is_patched(model) else None
        self.interval, self.warmup_steps, self.p_exploit, self.mode = interval, warmup_steps, p_exploit, mode
        self.score = score
        self._model, self._layers, self._held = model, [], []
        self._holds = self._succeeded = False
        self._set_engine(engines.Engine())
        older = self._release_older()
        self._bind()
        for selection in older:
            selection._succeeded = True
        _living.add(self)
        # The margin keeps products such as 0.29 * 100, one rounding below a whole number, on that number.
        self.k = max(1, math.floor(k_ratio * len(self._layers) + 1e-9))
        self.selected_layers = self.layers
        self.history: list[Selection] = []
        self._steps = 0
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._forward_seen = False
        self._watch_forward()
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
            RuntimeError: no norm has a gradient at a selection step; or the adapter that this optimizer was built for
                is not in the model: another one was switched in, or it is disabled; or a later selection has taken over
                these layers. Nothing was changed.
            ValueError: the ranks of several processes were given other arguments. Nothing was changed.
        """
        self._check_in_charge("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._bind()
        begins, ends = self._engine.extent(self.param_groups)
        if begins:
            self._begin_step()
        _drop_gradients(self._score_only)
        _drop_gradients(p for p, layers in self._holders.items() if layers.isdisjoint(self.selected_layers))
        self._engine.step(self.optimizer, self.selected_layers)
        if ends:
            self._prepare_next_step()
        return loss

    def unfreeze(self) -> None:
        """Gives every parameter the requires_grad flag it had at first; the next `step` freezes again."""
        self._set_flags(self.layers, score_only=False)
        self._holds = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all that the optimizer holds, and of norms that serve the score alone."""
        super().zero_grad(set_to_none)
        _drop_gradients(self._score_only)

    @property
    def _score_only(self) -> list[nn.Parameter]:
        return [p for layer in self._layers for p in layer.score_only]

    def _begin_step(self) -> None:
        self._check_ranks()
        if self._selects(self._steps + 1):
            selection = self._engine.first(self._select(self._steps + 1))
            self.history.append(selection)
            self.selected_layers = selection.layers
        self._steps += 1

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
        """Eq. 5: sqrt(|grad attn norm|^2 + |grad ffn norm|^2) of every layer, or the same over its adapter; a layer
        that took no part scores 0."""
        if not self._engine.saw_backward([p for layer in self._layers for p in layer.scored]):
            scored = self.score.removesuffix("s")
            raise RuntimeError(
                f"step {step} selects layers, but no {scored} has a gradient: call backward() before step(), and "
                "another optimizer's zero_grad() after it"
            )
        if any(p.grad is gradient for p, gradient in self._not_ours):
            _warn_once(
                "norms that DynamicLayerSelection reads for its score, and does not train, kept their gradients from "
                "one step to the next: unless they are cleared in place, the scores add up. Clear them at every step, "
                "as the optimizer that trains them does (model.zero_grad()), or give them to this one"
            )
        self._engine.reduce_unmanaged(self._score_only)
        squares, device = [], self._layers[0].scored[0].device
        for layer in self._layers:
            parts = [norm.to(device) for norm in map(self._engine.squared_norm, layer.scored) if norm is not None]
            squares.append(sum(parts, torch.zeros((), device=device)))
        scores = tuple(torch.stack(squares).sqrt().tolist())
        for layer, score in zip(self._layers, scores, strict=True):
            if not math.isfinite(score):
                raise FloatingPointError(
                    f"the gradients of layer {layer.index}'s {self.score} are not finite at step {step}"
                )
        return scores

    def _prepare_next_step(self) -> None:
        """At a selection step every layer computes gradients, since any may be chosen."""
        selects, freezes = self._selects(self._steps + 1), self._may_freeze()
        self._set_flags(self.selected_layers if freezes and not selects else self.layers, score_only=selects)
        elsewhere = [p for layer in self._layers for p in layer.elsewhere] if selects else []
        self._not_ours = [(p, p.grad) for p in elsewhere if p.grad is not None]
        self._holds = True

    def _may_freeze(self) -> bool:
        """In several processes not before a forward: until then, an engine may wrap or shard the model, and looks at
        the flags when it does."""
        if self.mode == "mask" or (dist.is_initialized() and not self._forward_seen):
            return False
        obstacle = self._engine.obstacle()
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
            self._engine.flags_changed()

    def _bind(self) -> None:
        """Finds the layers' parameters among the optimizer's; again where a group has come since, or FSDP2 has put
        shards in their place."""
        held = [p for group in self.param_groups for p in group["params"]]
        if self._layers and len(held) == len(self._held) and all(map(operator.is_, held, self._held)):
            return
        if self._layers and not any(is_among(p, self._model.parameters()) for p in held):
            if not isinstance(self._engine, Zero):
                elsewhere = [p for layer in self._layers for p in layer.elsewhere]
                self._set_engine(Zero(self.param_groups, self.score, [*self._holders], self._score_only, elsewhere))
            return
        if self._layers:
            self.unfreeze()
            for norm in self._score_only:
                norm.requires_grad_(is_among(norm, held) and not is_among(norm, self._held))
        earlier = self._layers
        self._layers, self._held = scored_layers(self.optimizer, self._model, self.score, earlier), held
        self._drop_gradients_as_they_come({p for layer in earlier for p in layer.parameters})
        engine = engines.engine_of(self._model, self._layers[0].parameters[0])
        if engine is not None:
            self._set_engine(engine)
        for layer in self._layers:
            self._engine.check_layer(layer.parameters + layer.scored)

    def _release_older(self) -> list[DynamicLayerSelection]:
        """Has older selections over these layers, which a scheduler for example may keep alive, let go of them."""
        released = []
        held = {id(p) for group in self.param_groups for p in group["params"]}
        layers = [{id(p) for p in layer.module.parameters()} for layer in decoder_layers(self._model)]
        near = {p for layer in layers if layer & held for p in layer}
        for older in list(_living):
            theirs = [*older._holders]
            if older._adapter is not self._adapter or not any(id(p) in near for p in theirs):
                continue
            if older._holds and not any(id(p) in held for p in theirs):
                raise ValueError(
                    "another DynamicLayerSelection is at work on these layers, and two would select apart: give both "
                    "groups of parameters to one optimizer, or wrap one optimizer and leave the other plain; if the "
                    "other selection has done its work, call its unfreeze() first"
                )
            lost = sum(1 for p in theirs if not p.requires_grad and id(p) not in held)
            if lost:
                raise ValueError(
                    f"an earlier layer selection has frozen {lost} parameters that this optimizer lacks and would "
                    "never train: call unfreeze() of that selection before you collect another optimizer's parameters"
                )
            older.unfreeze()
            released.append(older)
        return released

    def _check_in_charge(self, call: str) -> None:
        if self._adapter is not None and not self._adapter.attached:
            raise RuntimeError(
                "this optimizer was built for an adapter that is not in the model now, and would move the norms of the "
                f"one that is: switch back with rosa.set_adapter, or leave `rosa.disabled`, before {call}"
            )
        if self._succeeded:
            raise RuntimeError(
                f"{call} of a layer selection whose layers a later DynamicLayerSelection has taken over: go on with "
                "that one, or make another over this one's `.optimizer`"
            )

    def _set_engine(self, engine: engines.Engine) -> None:
        self._engine, self._ranks_agree = engine, False

    def _check_ranks(self) -> None:
        if self._ranks_agree:
            return
        names = ("k", "num_layers", "interval", "warmup_steps", "p_exploit", "mode", "score", "_steps")
        self._engine.check_equal({name.strip("_"): getattr(self, name) for name in names})
        self._ranks_agree = True

    def _drop_gradients_as_they_come(self, watched: set[nn.Parameter]) -> None:
        """Gradient clipping between backward and step must see the selected layers only, also where others are not
        frozen. `watched` are seen to already."""
        reference = weakref.ref(self)  # the parameters, which keep the hooks, may outlive this optimizer

        def drop(layers: set[int], parameter: nn.Parameter) -> None:
            selection = reference()
            if selection is not None and selection._drops(layers):
                selection._engine.drop(parameter)

        self._holders = holders(self._layers)
        for parameter, layers in self._holders.items():
            parameter.requires_grad_(True)  # an optimizer that is gone may have left it frozen
            if parameter not in watched:
                parameter.register_post_accumulate_grad_hook(functools.partial(drop, layers))

    def _watch_forward(self) -> None:
        """Notes at every forward whether DDP runs it; in mode "skip" warns when the module that runs the layers, and so
        all of them at once, goes into one graph."""
        reference, warns = weakref.ref(self), self.mode == "skip"

        def note() -> None:
            selection = reference()
            if selection is not None:
                selection._note_forward()

        @torch.compiler.assume_constant_result  # torch.compile runs it when it makes a graph, not when the graph runs
        def note_graph() -> None:
            note()
            if warns:
                _warn_of_whole_graph()

        def watch(module: nn.Module, args: tuple) -> None:
            if torch.compiler.is_compiling():
                note_graph()
            else:
                note()

        name = decoder_layers(self._model)[0].name.rpartition(".")[0]  # of the list of layers
        runs_layers = self._model.get_submodule(name.rpartition(".")[0])
        weakref.finalize(self, runs_layers.register_forward_pre_hook(_Watch(watch)).remove)

    def _note_forward(self) -> None:
        if not torch.is_grad_enabled():
            return
        self._forward_seen = True
        ddp = engines.running_ddp()
        if ddp is not None and ddp is not getattr(self._engine, "ddp", None):
            self._set_engine(engines.DDP(ddp))

    def _drops(self, layers: set[int]) -> bool:
        if self._adapter is not None and not self._adapter.attached:  # the norms hold another adapter's weights now
            return False
        return self._holds and layers.isdisjoint(self.selected_layers) and not self._selects(self._steps + 1)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "layer_selection", the step, the selection and its generator.

        All tensors are whole, so that a run under any engine resumes from it; under FSDP2 every rank calls this.
        """
        own = {
            "step": self._steps,
            "selected_layers": list(self.selected_layers),
            "history": [tuple(selection) for selection in self.history],
            "generator": self._generator.get_state(),
            "num_layers": self.num_layers,
        }
        return {**whole_state(self.optimizer.state_dict()), "layer_selection": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave: the run goes on as if it had not stopped.

        Raises:
            ValueError: the state has no layer selection, or one over another number of layers. Nothing was changed.
            RuntimeError: as `step` raises it, where another adapter or a later selection has taken over.
        """
        self._check_in_charge("load_state_dict()")
        own = state_dict.get("layer_selection")
        if own is None:
            raise ValueError(
                "this state has no 'layer_selection': it is of an optimizer without DLS, or something kept only what "
                "all optimizers have, as Accelerate's save_state does under FSDP2 (there, save and load `state_dict()` "
                "yourself). Load it into `.optimizer` to begin selecting anew"
            )
        if own["num_layers"] != self.num_layers:
            raise ValueError(f"this state selects among {own['num_layers']} layers, the model has {self.num_layers}")
        self._bind()
        state = {key: value for key, value in state_dict.items() if key != "layer_selection"}
        self.optimizer.load_state_dict(shard_state(state, self._held))
        self._steps = own["step"]
        self.selected_layers = tuple(own["selected_layers"])
        self.history = [Selection(s, tuple(layers), e, tuple(scores)) for s, layers, e, scores in own["history"]]
        self._generator.set_state(own["generator"].cpu())
        self._ranks_agree = False
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
        """Adds a group to the wrapped optimizer. What it has of the layers that take part belongs to these from now on,
        norms that served the score alone too, and does not move while its layer is outside the selection. All else
        always trains: which layers take part was fixed at construction."""
        self._check_in_charge("add_param_group()")
        holds = self._holds
        self.optimizer.add_param_group(param_group)
        self._bind()
        self._engine.flags_changed()  # a norm that served the score alone may be new to DDP
        if holds:
            self._prepare_next_step()

    def __getattr__(self, name: str) -> Any:
        # What some optimizers have beyond the common interface, such as `train` and `eval` of schedule-free ones.
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own takes what only the wrapped optimizer has. A copy would copy the whole model too.
        return {**self.__dict__, "_adapter": None, "_model": None, "_engine": engines.Engine()}

    def __repr__(self) -> str:
        return f"DynamicLayerSelection(k={self.k} of {self.num_layers}, mode={self.mode!r}, {self.optimizer!r})"


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


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _check(optimizer, k_ratio, interval, warmup_steps, p_exploit, mode, score, seed) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, DynamicLayerSelection):
        raise TypeError("optimizer is a DynamicLayerSelection already; wrap the optimizer inside it")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} calls its closure several times a step and moves parameters that have no "
            "gradient, so that layers cannot be left out of a step; use an optimizer whose step() needs no closure"
        )
    for name, value in (("interval", interval), ("warmup_steps", warmup_steps), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not -(2**63) <= seed < 2**64:  # what torch's generators take
        raise ValueError(f"seed must lie in -2**63 to 2**64 - 1, got {seed}")
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
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
