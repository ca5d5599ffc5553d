"""Adapters on disk: saved from a patched model, loaded into a model of their base."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rosa.adapters.config import AdapterConfig
from rosa.adapters.folder import (
    ADAPTER_TYPE,
    FORMAT_VERSION,
    is_peft,
    local_folder,
    open_adapter,
    refuse_model_folder,
    write_adapter,
    write_peft_adapter,
)
from rosa.adapters.patching import add_adapter
from rosa.adapters.peft_road import in_peft_order, open_peft_road, peft_config
from rosa.adapters.plan import METHODS, describe_base, make_adapter, method_of, plan_adapter
from rosa.adapters.record import is_patched, patched
from rosa.errors import AdapterError
from rosa.models.sharding import gathered, is_managed, is_partitioned, shard_like, whole


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None, *, as_peft: bool = False
) -> None:
    """Saves what an adapter of a patched model has learned: its modules' weights, norms if it trains them, and a card.

    Of a model sharded by FSDP2 or ZeRO-3 every rank calls this, and the first one writes.

    Args:
        model (nn.Module): a patched model, wrapped or not; the names in the file are those of the plain model.
        folder (path): made if need be; an adapter in it is replaced, at once or, if the process is killed, not at all.
            A README.md that somebody else wrote stays as it is.
        adapter_name (str, optional): None saves the active adapter.
        as_peft (bool): write what `peft.PeftModel.from_pretrained` loads, without a card: a RoAd adapter without norms
            whose layers all pair in groups of one size.

    Raises:
        ValueError: the model is not patched, the adapter stands on the meta device, the folder holds a model, or peft
            has no such adapter.
        KeyError: the model has no such adapter.
        FloatingPointError: a value is not finite.
        OSError: the files cannot be written.
        Nothing is written then, and an adapter that was there is whole.
    """
    adapter = patched(model)[1].adapter(adapter_name)
    if any(tensor.is_meta for tensor in adapter.tensors().values()):
        raise ValueError("this model is on the meta device: its adapter has no values to save")
    folder = Path(folder)
    refuse_model_folder(folder)
    theirs = peft_config(model, adapter) if as_peft else None
    parameters = list(adapter.parameters().values())
    with gathered(parameters):
        tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in adapter.tensors().items()}
    broken = _not_finite(tensors)
    if broken:
        raise FloatingPointError(f"{broken}, so the adapter was not saved; what was in {folder} is as it was")
    if any(isinstance(p, DTensor) or is_partitioned(p) for p in parameters) and dist.get_rank() != 0:
        return
    if theirs is not None:
        return write_peft_adapter(folder, theirs, in_peft_order(tensors, theirs))
    description = {
        "adapter_type": ADAPTER_TYPE,
        "format_version": FORMAT_VERSION,
        "method": method_of(adapter.config),
        "base_model_name_or_path": base_name(model),
        "base": adapter.base,
        "config": asdict(adapter.config),
    }
    write_adapter(folder, description, tensors)


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
            has the parameters, the active adapter is merged, or an adapter would be added inside
            `torch.inference_mode()`.
        Nothing is changed after an error.
    """
    folder = local_folder(source, revision, token)
    with open_peft_road(folder, model) if is_peft(folder) else open_adapter(folder) as stored:
        config = _config(stored.description, source)
        _check_base(model, config, stored.description, source)
        record = patched(model)[1] if is_patched(model) else None
        known = record is not None and adapter_name in record.adapters
        if known:
            record.check_unmerged()
            adapter = record.adapters[adapter_name]
            if adapter.config != config:
                raise ValueError(f"this model is patched with {adapter.config}, the adapter in {source} has {config}")
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
        tensors = {name: stored.tensor(name).to(place.dtype) for name, place in adapter.tensors().items()}
    broken = _not_finite(tensors)
    if broken:
        raise AdapterError(f"the weights in {source} are of no use: {broken}")

    for name, place in adapter.tensors().items():
        place.copy_(shard_like(tensors[name], place))
    if not known:
        add_adapter(model, adapter_name, adapter)
    elif adapter_name != record.active:
        record.switch(adapter_name)
    return model


def base_name(model: nn.Module) -> str | None:
    """The name or path that the patched model was loaded from, as far as it has one."""
    return getattr(getattr(patched(model)[0], "config", None), "name_or_path", None) or None


def _config(description: dict[str, Any], source: str | os.PathLike) -> AdapterConfig:
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


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor with a value that is not finite, in words."""
    return next((f"{name} holds values that are not finite" for name, t in tensors.items() if not _finite(t)), None)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
