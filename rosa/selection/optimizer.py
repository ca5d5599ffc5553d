"""DLS (Dynamic Layer Selection): an optimizer wrapper that trains a few decoder layers at a time.

Here it is an optimizer to whoever takes one. What it wraps beside the optimizer are two parts: a `Selector`, which is
Algorithm 1, and a `Freezing`, which has the layers follow it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rosa.models.sharding import shard_state, whole_state
from rosa.selection.algorithm import Priorities, Selection, Selector, check_settings
from rosa.selection.charge import check_in_charge, taking_charge
from rosa.selection.freezing import MODES, Freezing
from rosa.selection.scored_layers import SCORES


def _of(part: str, name: str) -> Any:
    """An attribute of a part, which is as much the whole's."""
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )


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

    Norms that nobody trains have gradients at a step that selects, for the score alone. So clip the gradients of what
    the optimizers hold, and not of `model.parameters()`. A GradScaler does not unscale them: such scores carry its
    scale, which leaves their order as it is.

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
            parameters take the same course either way, gradient clipping included: at a step that selects it sees all
            layers, and of norms that nobody trains those that are scored. Under torch.compile, compile the
            decoder layers one by one for "skip" (`layer.compile()`): a model compiled as a whole, which is warned of,
            makes another graph at each selection.
        score (str): "norms" ranks layers by the gradients of their norms (Eq. 5); "adapter" by those of all that the
            optimizer holds of the layer but its norms, for models whose norms have no weights.
        seed (int): of the generator that draws the selections, from -2**63 to 2**64 - 1; of several processes, the
            first one's counts.
        priorities (callable, optional): ranks the layers where they are not chosen at random: it is given the list of
            Selection so far and the scores of this step, in the order of `layers`, and returns a number for each layer.
            None ranks by the scores, as the paper does. It is not in `state_dict`.

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
        priorities: Priorities | None = None,
    ):
        _check_optimizer(optimizer)
        check_settings(k_ratio, interval, warmup_steps, p_exploit, seed)
        _check_choice("mode", mode, MODES)
        _check_choice("score", score, SCORES)
        self.optimizer = optimizer
        super().__setstate__({})  # hooks and profiling; Optimizer.__init__ would also build param_groups of its own
        self._freezing = Freezing(optimizer, model, mode, score)
        with taking_charge(self._freezing):
            self._freezing.bind()
        self._selector = Selector(self.layers, k_ratio, interval, warmup_steps, p_exploit, seed, priorities)
        self._freezing.watch_forward()
        self._freezing.hold(self._selector)

    k: int = _of("_selector", "k")
    interval: int = _of("_selector", "interval")
    warmup_steps: int = _of("_selector", "warmup_steps")
    p_exploit: float = _of("_selector", "p_exploit")
    selected_layers: tuple[int, ...] = _of("_selector", "selected_layers")
    history: list[Selection] = _of("_selector", "history")
    mode: str = _of("_freezing", "mode")
    score: str = _of("_freezing", "score")

    @property
    def layers(self) -> tuple[int, ...]:
        return self._freezing.layers

    @property
    def num_layers(self) -> int:
        return len(self.layers)

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
        check_in_charge(self._freezing, "step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._freezing.bind()
        engine = self._freezing.engine
        begins, ends = engine.extent(self.param_groups)
        if begins:
            self._begin_step()
        self._freezing.drop_gradients_outside(self.selected_layers)
        engine.step(self.optimizer, self.selected_layers)
        if ends:
            self._freezing.hold(self._selector)
        return loss

    def _begin_step(self) -> None:
        self._check_ranks()
        selector = self._selector
        if selector.selects_next:
            chosen = selector.choose(self.layers, self._freezing.scores(selector.steps + 1))
            selector.adopt(self._freezing.engine.first(chosen))
        selector.steps += 1

    def _check_ranks(self) -> None:
        engine = self._freezing.engine
        if not engine.ranks_agree:
            names = ("k", "num_layers", "interval", "warmup_steps", "p_exploit", "mode", "score")
            engine.check_equal({name: getattr(self, name) for name in names} | {"steps": self._selector.steps})
            engine.ranks_agree = True

    def unfreeze(self) -> None:
        """Gives every parameter the requires_grad flag it had at first; the next `step` freezes again."""
        self._freezing.unfreeze()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all that the optimizer holds, and of norms that serve the score alone."""
        super().zero_grad(set_to_none)
        self._freezing.drop_score_only_gradients()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "layer_selection", the step, the selection and its generator.

        All tensors are whole, so that a run under any engine resumes from it; under FSDP2 every rank calls this.
        """
        own = {**self._selector.state_dict(), "num_layers": self.num_layers, "layers": list(self.layers)}
        return {**whole_state(self.optimizer.state_dict()), "layer_selection": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave: the run goes on as if it had not stopped.

        Raises:
            ValueError: the state has no layer selection, or one over other layers. Nothing was changed.
            RuntimeError: as `step` raises it, where another adapter or a later selection has taken over.
        """
        check_in_charge(self._freezing, "load_state_dict()")
        own = state_dict.get("layer_selection")
        if own is None:
            raise ValueError(
                "this state has no 'layer_selection': it is of an optimizer without DLS, or something kept only what "
                "all optimizers have, as Accelerate's save_state does under FSDP2 (there, save and load `state_dict()` "
                "yourself). Load it into `.optimizer` to begin selecting anew"
            )
        if own["num_layers"] != self.num_layers:
            raise ValueError(f"this state selects among {own['num_layers']} layers, the model has {self.num_layers}")
        ours = list(self.layers)
        theirs = own.get("layers", ours)  # a state of old does not name them
        if theirs != ours:
            raise ValueError(f"this state selects among layers {theirs}, and the optimizer holds layers {ours}")
        self._freezing.bind()
        state = {key: value for key, value in state_dict.items() if key != "layer_selection"}
        self.optimizer.load_state_dict(shard_state(state, self._freezing.held))
        self._selector.load_state_dict(own)
        self._freezing.engine.ranks_agree = False
        self._freezing.hold(self._selector)

    # To everyone who asks, the wrapped optimizer's groups, state and defaults are this one's.

    param_groups = _of("optimizer", "param_groups")
    state = _of("optimizer", "state")
    defaults = _of("optimizer", "defaults")

    # Hooks on its state are the wrapped one's too; those on a step are run here, around the selection.

    register_state_dict_pre_hook = _of("optimizer", "register_state_dict_pre_hook")
    register_state_dict_post_hook = _of("optimizer", "register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _of("optimizer", "register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _of("optimizer", "register_load_state_dict_post_hook")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer. What it has of the layers that take part belongs to these from now on,
        norms that served the score alone too, and does not move while its layer is outside the selection. All else
        always trains: which layers take part was fixed at construction."""
        check_in_charge(self._freezing, "add_param_group()")
        choice = self._freezing.choice
        self.optimizer.add_param_group(param_group)
        self._freezing.bind()
        self._freezing.engine.flags_changed()  # a norm that served the score alone may be new to DDP
        if choice is not None:
            self._freezing.hold(choice)

    def __getattr__(self, name: str) -> Any:
        # What some optimizers have beyond the common interface, such as `train` and `eval` of schedule-free ones.
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # Optimizer's own takes what only the wrapped optimizer has

    def __repr__(self) -> str:
        return f"DynamicLayerSelection(k={self.k} of {self.num_layers}, mode={self.mode!r}, {self.optimizer!r})"


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, DynamicLayerSelection):
        raise TypeError("optimizer is a DynamicLayerSelection already; wrap the optimizer inside it")
    accelerate = sys.modules.get("accelerate.optimizer")  # not imported for this
    if accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer):
        raise TypeError(
            "optimizer has been through `accelerator.prepare`, and while gradients accumulate it leaves out steps that "
            f"layer selection would count: wrap the {type(optimizer.optimizer).__name__} first, and hand this to "
            "`accelerator.prepare`"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} calls its closure several times a step and moves parameters that have no "
            "gradient, so that layers cannot be left out of a step; use an optimizer whose step() needs no closure"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
