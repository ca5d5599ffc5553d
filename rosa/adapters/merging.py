"""`merge` and `unmerge`: RoAd in the weights of the linear layers, and out of them again."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rosa.adapters.config import RoadConfig
from rosa.adapters.record import Adapter, Kept, patched
from rosa.adapters.road import Road, wrapped_since
from rosa.errors import UnsupportedModelError
from rosa.models.linear import is_conv1d, is_plain
from rosa.models.names import plain
from rosa.models.sharding import check_not_sharded
from rosa.models.trainable import is_quantized
from rosa_kernels.road_reference import coefficients, pairs, road_reference


def merge(model: nn.Module) -> nn.Module:
    """Puts what the active adapter does to the outputs of linear layers into their weights, in place: W' = R W and
    b' = R b, computed in float32 (float64 for weights of float64) and rounded once. Norms that it trained keep their
    values, in the base's dtype.

    The model then computes at the base's cost, and `save_pretrained` writes it as a model like any other. The adapter
    rests: `save_adapter` saves it, and it cannot be trained, switched, disabled or loaded anew before `unmerge`, for
    which the base's weights stay in memory. `unpatch` brings the base back.

    Args:
        model (nn.Module): a patched model whose active adapter is RoAd's.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched, is inside `disabled`, is sharded or merged already, the adapter is
            RoSA's, what it stands in was replaced or copied, or it does something that no inverse leads back from, or
            values that are not finite.
        UnsupportedModelError: a linear layer is quantized, offloaded or not a plain one, its weight is another
            module's too, or RoPE turns what was put around it since.
        Nothing is changed after an error.
    """
    owner, record = patched(model)
    record.check_switchable(model)
    adapter = record.active_adapter
    if not isinstance(adapter.config, RoadConfig):
        raise ValueError(
            f"the adapter {record.active!r} is RoSA's, which cannot be merged: what it does to queries and keys "
            "depends on the input, so no weight does the same. The norms that it trained can be, and are: their "
            "weights in the model are the trained ones"
        )
    _refuse_wrapped(adapter)
    roads = {name: (adapter.hosts[name], m) for name, m in adapter.modules.items() if isinstance(m, Road)}
    for name, (linear, road) in roads.items():
        _refuse_unmergeable(name, linear)
        _refuse_singular(name, road)
    _refuse_shared(owner, {name: linear for name, (linear, _) in roads.items()})
    with torch.inference_mode(False), torch.no_grad():
        merged = [new for name, (linear, road) in roads.items() for new in _merged(name, linear, road)]
    adapter.detach()
    record.kept = [_exchange(new) for new in merged + _norms(adapter)]
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Takes a merged adapter out of the weights again, which are bit for bit what they were, and has it adapt the model
    as before; it can be trained on. Whatever happened to the merged weights since is lost.

    Raises:
        ValueError: the model is not patched, nothing is merged into it, or it was sharded or offloaded since.
            Nothing is changed then.
    """
    record = patched(model)[1]
    if not record.kept:
        raise ValueError(f"no adapter is merged into this {type(model).__name__}: rosa.merge(model) does that")
    check_not_sharded(model)
    if any(getattr(kept.module, kept.name).is_meta and not kept.data.is_meta for kept in record.kept):
        raise ValueError(
            f"this {type(model).__name__} was offloaded since the adapter {record.active!r} was merged, and its "
            "weights are elsewhere: unmerge before it is offloaded"
        )
    for kept in record.kept:
        _exchange(kept)
    record.kept = []
    record.active_adapter.move()
    record.active_adapter.attach()
    return model


def _merged(name: str, linear: nn.Module, road: Road) -> list[Kept]:
    """The layer's weight and bias with its RoAd in them."""
    new = []
    for weight in ("weight", "bias"):
        value = getattr(linear, weight)
        if value is None:
            continue
        by_outputs = value.dim() == 1 or is_conv1d(linear)
        merged = _adapted(road, value if by_outputs else value.T)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"{name}.{weight} would hold values that are not finite in {value.dtype}: it is not merged"
            )
        new.append(Kept(linear, weight, merged if by_outputs else merged.T))
    return new


def _adapted(road: Road, outputs: Tensor) -> Tensor:
    # By the reference, which never works in place.
    return road_reference(outputs, road.theta, road.alpha, **road.options)


def _norms(adapter: Adapter) -> list[Kept]:
    """The norm weights that an adapter, which is not attached, has learned."""
    return [
        Kept(norm, "weight", adapter.weights[name].data.to(cast(Tensor, norm.weight).dtype))
        for name, norm in adapter.norms.items()
    ]


def _exchange(new: Kept) -> Kept:
    """Puts a value in and returns what was there; in the device and the dtype that the model has by now.

    By `.data` and not in place: what is kept is the base's own tensor, and who shares its memory sees no change.
    """
    weight = getattr(new.module, new.name)
    old = new._replace(data=weight.data)
    weight.data = new.data.to(weight.device, weight.dtype)
    return old


def _refuse_unmergeable(name: str, linear: nn.Module) -> None:
    kind = f"{type(linear).__module__}.{type(linear).__name__}"
    tensors = [*linear.parameters(recurse=False), *linear.buffers(recurse=False)]
    quantized = next((tensor for tensor in tensors if is_quantized(tensor)), None)
    if quantized is not None:
        raise UnsupportedModelError(
            f"{name} is quantized ({kind}, {quantized.dtype}), and what RoAd makes of its weights would have to be "
            "rounded to few bits anew: leave the adapter beside it, or load it into the base in 16 or 32 bits and "
            "merge there"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise UnsupportedModelError(
            f"{name} has no values here to merge into: it is offloaded or on the meta device. Merge before the model "
            "is offloaded"
        )
    if "weight" not in linear._parameters or not is_plain(linear):
        raise UnsupportedModelError(
            f"{name} is a {kind}, and what that computes is more than its own weight and bias say. Where something "
            "was put around the linear layer, save the adapter with rosa.save_adapter, call rosa.unpatch(model), take "
            "that off (merge_and_unload of a PEFT model, for example), and load the adapter again"
        )


def _refuse_wrapped(adapter: Adapter) -> None:
    name = wrapped_since(adapter.modules, adapter.hosts)
    if name is not None:
        raise UnsupportedModelError(
            f"{name} was wrapped since it has RoAd, by LoRA of PEFT for example. RoPE and RoAd being one operation "
            "there, that is turned too, as it would not be with RoAd in the weights: leave the adapter beside them, or "
            "take off what was put around the linear layer (`unload` of a PEFT model, for example)"
        )


def _refuse_singular(name: str, road: Road) -> None:
    theta, alpha = road.theta.detach().double(), road.alpha.detach().double()
    first, second = coefficients(theta, alpha, road.width, **road.options)
    one, other = pairs(road.width, *road.pairing, first.device)
    # The rows of Eq. 3: z1 = first1 h1 - second1 h2, z2 = second2 h1 + first2 h2.
    determinant = first[one] * first[other] + second[one] * second[other]
    lengths = first[one].hypot(second[one]) * first[other].hypot(second[other])
    rounding = torch.finfo(torch.float32).eps * lengths  # all that is left of a determinant of 0
    invertible = (determinant.abs() > rounding) & determinant.isfinite()
    if not invertible.all():
        at = int((~invertible).nonzero()[0])
        raise ValueError(
            f"{name} cannot be merged: the block of outputs {int(one[at])} and {int(other[at])} is singular "
            f"(determinant {determinant[at].item():.3g}), so that no inverse leads back from the merged weights. Train "
            "the adapter on, or leave it beside the weights"
        )


def _refuse_shared(owner: nn.Module, linears: dict[str, nn.Module]) -> None:
    """A weight that two modules have, as tied embeddings are, would change for both."""
    users: dict[int, list[str]] = {}
    for name, module in owner.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(plain(name))
    for name, linear in linears.items():
        for key, parameter in linear.named_parameters(recurse=False):
            other = next((user for user in users[id(parameter)] if user != name), None)
            if other is not None:
                raise UnsupportedModelError(
                    f"{name}.{key} belongs to {other} too, which has no such adapter: untie the two before you merge"
                )
