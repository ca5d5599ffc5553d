"""Adapters loaded from disk into a model of their base."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from rosa.adapters.config import AdapterConfig
from rosa.adapters.folder import FORMAT_VERSION, is_peft, local_folder, open_adapter
from rosa.adapters.patching import add_adapter
from rosa.adapters.peft_road import open_peft_road
from rosa.adapters.plan import METHODS, describe_base, make_adapter, plan_adapter
from rosa.adapters.record import is_patched, patched
from rosa.adapters.saving import not_finite
from rosa.errors import AdapterError
from rosa.models.sharding import is_managed, shard_like


def load_adapter(
    model: nn.Module,
    source: str | os.PathLike,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """Loads an adapter into a model in place and switches it in, patching the model first if it is not; it can be
    trained on.

    Args:
        model (nn.Module): a model of the adapter's base, wrapped or not. If it is patched, the adapter of this name is
            overwritten, or one is added.
        source (path or str): a folder that `save_adapter` wrote, or one of peft's with an adapter of its RoAd, or a
            repository of the Hugging Face hub ("user/name").
        adapter_name (str): its name in the model.
        revision (str, optional): branch, tag or commit on the hub; None is "main".
        token (str, optional): for the hub; None takes the one that `hf auth login` stored, or HF_TOKEN.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        AdapterError: a damaged file, an unknown format version, values that are not finite, or an adapter for another
            base model, or of a kind of peft's that is not RoAd.
        ValueError: the model has an adapter of this name with another configuration, the name does not fit, DeepSpeed
            has the parameters, the model is offloaded or on the meta device, the active adapter is merged, what an
            adapter stands in was replaced or copied, or one would be added inside `torch.inference_mode()`.
        Nothing is changed after an error.
    """
    folder = local_folder(source, revision, token)
    with open_peft_road(folder, model) if is_peft(folder) else open_adapter(folder) as stored:
        config = adapter_config(stored.description, source)
        _check_base(model, config, stored.description, source)
        record = patched(model)[1] if is_patched(model) else None
        known = record is not None and adapter_name in record.adapters
        if known:
            record.check_unmerged()
            record.check_in_place(model, adapter_name)
            adapter = record.adapters[adapter_name]
            if adapter.config != config:
                raise ValueError(
                    f"the adapter {adapter_name!r} of this {type(model).__name__} has {adapter.config}, the one in "
                    f"{source} has {config}: load it under another adapter_name"
                )
            if adapter_name != record.active:
                record.check_switchable(model)
            _refuse_managed(model, adapter.parameters().values())
            shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
        else:
            plan = plan_adapter(model, config, adapter_name)
            _refuse_managed(model, (norm.weight for norm in plan.norms.values()))
            shapes = plan.shapes()
        mismatch = stored.mismatch(shapes)
        if mismatch:
            raise AdapterError(f"the weights in {source} do not fit this {type(model).__name__}: {mismatch}")
        if not known:  # only now: what it takes in memory is there on disk
            adapter = make_adapter(plan, empty=True)
            _refuse_managed(model, adapter.parameters().values())
        if adapter.lacks_values():
            raise ValueError(
                f"this {type(model).__name__} is offloaded or on the meta device, and what is loaded into it would be "
                "lost: load the adapter into a model in memory, which may be offloaded then"
            )
        tensors = {name: stored.tensor(name).to(place.dtype) for name, place in adapter.tensors().items()}
    broken = not_finite(tensors)
    if broken:
        raise AdapterError(f"the weights in {source} are of no use: {broken}")

    for name, place in adapter.tensors().items():
        place.copy_(shard_like(tensors[name], place))
    if not known:
        add_adapter(model, adapter_name, adapter)
    elif adapter_name != record.active:
        record.switch(adapter_name)
    return model


def adapter_config(description: dict[str, Any], source: str | os.PathLike) -> AdapterConfig:
    """The configuration of an adapter of RoSA's by its description.

    Raises:
        AdapterError: it is of another format version, of an unknown method, or unusable.
    """
    version = description.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise AdapterError(
            f"the adapter in {source} has format version {version!r}, this RoSA reads {FORMAT_VERSION}: "
            "load it with the version of RoSA that wrote it, or a newer one"
        )
    method = description.get("method", "rosa")  # what had none when there was one
    if method not in list(METHODS):  # it may be anything that JSON holds
        raise AdapterError(f"the adapter in {source} is of a method {method!r}, known are {', '.join(METHODS)}")
    try:
        return METHODS[method].config(**description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"the adapter in {source} has an unusable configuration: {error}") from error


def _check_base(
    model: nn.Module, config: AdapterConfig, description: dict[str, Any], source: str | os.PathLike
) -> None:
    here, base = describe_base(model, config), description["base"]
    missing = here.keys() - base.keys()
    if missing:
        raise AdapterError(f"the adapter in {source} does not say {', '.join(sorted(missing))} of its base")
    theirs = description.get("base_model_name_or_path") or "its base"
    differences = [
        f"{field} is {here.get(field)} in this {type(model).__name__}, {expected} in {theirs}"
        for field, expected in base.items()
        if here.get(field) != expected
    ]
    if differences:
        text = " ".join("; ".join(differences).split())  # whatever the file holds
        raise AdapterError(f"the adapter in {source} was made for another base: {text}")


def _refuse_managed(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    if any(map(is_managed, parameters)):
        raise ValueError(
            f"DeepSpeed keeps the parameters of this {type(model).__name__} already, and would not see other values: "
            "load the adapter before deepspeed.initialize, and not under ZeRO-3's Init"
        )
