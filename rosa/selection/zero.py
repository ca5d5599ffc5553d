"""Layer selection under DeepSpeed's ZeRO, which flattens every param group into one tensor, keeps a part of it on each
rank, and has the optimizer step group by group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rosa.adapters.parameters import trainable_parameters
from rosa.models.decoder import decoder_layers
from rosa.models.sharding import is_managed, is_partitioned
from rosa.selection.engines import Engine, average_gradients


def layer_groups(model: nn.Module, groups: Iterable[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Param groups for an optimizer under DeepSpeed's ZeRO, each of one decoder layer or of none.

    ZeRO makes one tensor of a group, and layer selection can leave out whole groups only. The norms, whose gradients
    are the scores (Eq. 5), have groups of their own at the end: ZeRO gives up a group's gradients when it steps it.

    Args:
        model (nn.Module): the model, before DeepSpeed has it.
        groups (iterable of dict, optional): the groups to divide, of weight decay and without it for example; None
            divides `rosa.trainable_parameters(model)`.

    Returns:
        Groups with the keys they had, and `layer` (int or None) and `last` (bool, of the list).

    Raises:
        ValueError: nothing but norms is to train, or a parameter that several layers share.
        UnsupportedModelError: the model has no decoder layers.
    """
    layers: dict[int, list[int]] = {}
    norms: set[int] = set()
    for index, decoder_layer in enumerate(decoder_layers(model)):
        for parameter in decoder_layer.module.parameters():
            layers.setdefault(id(parameter), []).append(index)
        norms |= {id(p) for norm in decoder_layer.norms.values() for p in norm.parameters()}
    divided: dict[tuple, dict[str, Any]] = {}
    for number, group in enumerate([{"params": trainable_parameters(model)}] if groups is None else groups):
        for parameter in group["params"]:
            layer, *others = layers.get(id(parameter), [None])
            if others:
                raise ValueError(
                    f"layers {layer} and {others[0]} share a parameter that is to train, and under DeepSpeed's ZeRO "
                    "layer selection knows one layer a parameter: freeze it, or use dls=None"
                )
            place = (id(parameter) in norms, -1 if layer is None else layer, number)
            new = divided.setdefault(place, group | {"params": [], "layer": layer, "last": False})
            new["params"].append(parameter)
    result = [divided[place] for place in sorted(divided)]
    if all(of_norms for of_norms, _, _ in divided):
        raise ValueError("only norms are to train, and ZeRO would give up their gradients before they are scored")
    result[-1]["last"] = True
    return result


def check_optimizer_is_used(config: dict[str, Any]) -> None:
    """Raises ValueError where DeepSpeed's configuration has another optimizer take the place of the one it is given."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if "optimizer" in config:
        reason = "has an `optimizer` of its own: take it out"
    elif offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        reason = 'offloads to an optimizer of its own: set "zero_force_ds_cpu_optimizer": false'
    else:
        return
    raise ValueError(f"layer selection would have no effect, as the DeepSpeed configuration {reason}, or use dls=None")


class Zero(Engine):
    """ZeRO of any stage: a call of the optimizer steps one group, or in stage 3 a part of one.

    Parameters may stop requiring gradients between steps: DeepSpeed counts at every backward what takes part.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        score: str,
        trained: list[nn.Parameter],
        score_only: list[nn.Parameter],
        elsewhere: list[nn.Parameter],
    ):
        if not all(map(is_managed, trained)):
            raise ValueError(
                "something other than DeepSpeed's ZeRO 1 to 3 has put tensors of its own in the optimizer's place, in "
                "which layers cannot be told apart; DeepSpeed does so in 16 bits at stage 0. Use ZeRO, or no layer "
                "selection"
            )
        if not all("layer" in group for group in groups):
            raise ValueError(
                "DeepSpeed's ZeRO makes one tensor of a param group, in which layers cannot be told apart: build the "
                "optimizer from rosa.layer_groups(model) instead of rosa.trainable_parameters(model)"
            )
        if score != "norms":
            raise ValueError(
                f"under DeepSpeed's ZeRO layers are ranked by score='norms', got {score!r}: let norms train, and give "
                "that one (rosa train: --dls_score norms, for RoAd --train_norms too)"
            )
        if any(map(is_partitioned, score_only)):
            raise ValueError("under ZeRO-3 gradients are reduced of what trains: let the norms train, or set no DLS")
        if elsewhere:
            raise ValueError(
                f"{len(elsewhere)} norms require gradients but are not in the optimizer, and DeepSpeed's ZeRO reduces "
                "the gradients of that alone: add them to it, or let them require none before layer selection is made"
            )
        self.groups = (dist.group.WORLD,)
        self._stepped: set[int] = set()

    def extent(self, groups: list[dict[str, Any]]) -> tuple[bool, bool]:
        parts = [group for group in groups if group["params"]]
        flat = {id(p) for group in parts for p in group["params"]}
        begins = not self._stepped or bool(flat & self._stepped)  # each is stepped once a step
        self._stepped = flat if begins else self._stepped | flat
        return begins, any(group["last"] for group in parts)

    def step(self, optimizer: torch.optim.Optimizer, selected: tuple[int, ...]) -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["layer"] is None or group["layer"] in selected]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups

    def drop(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:  # ZeRO wants a gradient of whatever backward reaches
            parameter.grad.zero_()

    def saw_backward(self, parameters: list[nn.Parameter]) -> bool:
        return True  # or ZeRO would not step

    def reduce_unmanaged(self, parameters: list[nn.Parameter]) -> None:
        average_gradients(parameters, dist.group.WORLD)

    def squared_norm(self, parameter: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
        return None if gradient is None else gradient.float().square().sum()
