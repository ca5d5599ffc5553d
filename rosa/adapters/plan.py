"""An adapter that fits a model, before anything is made for it: all of `patch` that can fail."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from rosa.adapters.config import AdapterConfig, RoadConfig, RosaConfig
from rosa.adapters.norm_weights import trained_weight
from rosa.adapters.record import COMPOSED, Adapter, is_patched, patched
from rosa.adapters.road_plan import RoadPlan, describe_road, plan_road
from rosa.adapters.roae_plan import RoaePlan, describe_roae, plan_roae
from rosa.models.decoder import DecoderLayer
from rosa.models.names import plain
from rosa.models.trainable import refuse_inference_mode, refuse_layers_without_backward


class Method(NamedTuple):
    """A kind of adapter: its configuration, where its modules go, and what of a model it must fit."""

    config: type[AdapterConfig]
    plan: Callable[[nn.Module, AdapterConfig], RoaePlan | RoadPlan]
    describe: Callable[[nn.Module], dict[str, int | str | bool]]


METHODS = {
    "rosa": Method(RosaConfig, plan_roae, describe_roae),
    "road": Method(RoadConfig, plan_road, describe_road),
}


class Plan(NamedTuple):
    """An adapter that fits a model: its modules, and the norms that it trains."""

    config: AdapterConfig
    own: RoaePlan | RoadPlan
    norms: dict[str, nn.Module]  # by the full names of their weights
    base_weights: dict[str, Tensor]  # of norms that hold another adapter's

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of everything that the adapter learns, by full name."""
        return self.own.shapes() | {name: tuple(norm.weight.shape) for name, norm in self.norms.items()}


def method_of(config: AdapterConfig) -> str:
    """The name in METHODS of the kind of adapter that a configuration is for.

    Raises:
        TypeError: it is for none.
    """
    name = next((name for name, method in METHODS.items() if type(config) is method.config), None)
    if name is None:
        raise TypeError(f"config must be a rosa.RosaConfig or a rosa.RoadConfig, got {type(config).__name__}")
    return name


def plan_adapter(model: nn.Module, config: AdapterConfig | None, adapter_name: str) -> Plan:
    """The adapter that `patch` adds, not made yet.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as `patch` does.
    """
    config = RosaConfig() if config is None else config
    method = METHODS[method_of(config)]
    if not isinstance(adapter_name, str) or not re.fullmatch(r"[\w-]+", adapter_name):
        raise ValueError(f"adapter_name must be letters, digits, '_' and '-', got {adapter_name!r}")
    owner, record = patched(model) if is_patched(model) else (unwrapped(model), None)
    base_weights = {}
    if record is not None:
        if adapter_name in record.adapters:
            raise ValueError(
                f"this {type(model).__name__} is patched already; call rosa.unpatch(model) first, or add another "
                f"adapter under another adapter_name than {adapter_name!r}"
            )
        record.check_switchable(model)
        base_weights = {name: weight.data for name, weight in record.active_adapter.weights.items()}
    if COMPOSED in owner.__dict__:
        raise ValueError(
            f"this {type(owner).__name__} has the rotations of rosa.compose, which has frozen it: call "
            "rosa.decompose(model) first, or patch a second model"
        )
    refuse_inference_mode(owner)
    refuse_layers_without_backward(owner)
    own = method.plan(owner, config)
    return Plan(config, own, _trained_norms(own.layers) if config.train_norms else {}, base_weights)


def make_adapter(plan: Plan, *, empty: bool = False) -> Adapter:
    """The adapter of a plan, not attached yet; `empty` leaves its modules without values."""
    made = plan.own.make(empty)
    return Adapter(
        plan.config,
        base=plan.own.base,
        hosts={name: host for name, (host, _) in made.items()},
        modules={name: module.train(host.training) for name, (host, module) in made.items()},
        norms=plan.norms,
        weights={
            name: trained_weight(norm, plan.base_weights.get(name, norm.weight), plan.config.torch_dtype)
            for name, norm in plan.norms.items()
        },
    )


def describe_base(model: nn.Module, config: AdapterConfig) -> dict[str, int | str | bool]:
    """The shape of the model that an adapter of this kind must fit; of a patched model as it was found when the first
    one was added, whatever has replaced its rotary function since.

    Raises:
        UnsupportedModelError: the model cannot have such an adapter.
    """
    name = method_of(config)
    if is_patched(model):
        for adapter in patched(model)[1].adapters.values():
            if method_of(adapter.config) == name:
                return adapter.base
    return METHODS[name].describe(unwrapped(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, or torch.compile's, DDP's or DeepSpeed's, which are modules with one child."""
    from transformers import PreTrainedModel  # takes seconds, and by now it has been imported

    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # PEFT's, which may hold a learned prompt beside the model
            model = model.get_base_model()
        elif len(children := list(model.children())) == 1:
            (model,) = children
        else:
            break
    return model


def _trained_norms(layers: list[DecoderLayer]) -> dict[str, nn.Module]:
    """The norms of the adapted layers by the full names of their weights; not those that share one, as the repeated
    blocks of Zamba 2 do."""
    norms = {f"{plain(name)}.weight": norm for layer in layers for name, norm in layer.norms.items()}
    shared = Counter(id(norm.weight) for norm in norms.values())
    return {name: norm for name, norm in norms.items() if shared[id(norm.weight)] == 1}
