"""Adapters saved from patched models."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rosa.adapters.base import describe_origin
from rosa.adapters.folder import (
    ADAPTER_TYPE,
    FORMAT_VERSION,
    refuse_model_folder,
    write_adapter,
    write_peft_adapter,
)
from rosa.adapters.peft_road import in_peft_order, peft_config
from rosa.adapters.plan import method_of
from rosa.adapters.record import patched
from rosa.models.sharding import gathered, is_partitioned, whole


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None, *, as_peft: bool = False
) -> None:
    """Saves what an adapter of a patched model has learned: its modules' weights, norms if it trains them, and a card.

    Of a model sharded by FSDP2 or ZeRO-3 every rank calls this, and the first one writes.

    Args:
        model (nn.Module): a patched model, wrapped or not; the names in the file are those of the plain model.
        folder (path): made if need be; an adapter in it is replaced, at once or, if the process is killed, not at all.
            A README.md that somebody else wrote stays as it is, and so do a tokenizer and the form of the prompts that
            `rosa train` left there: give an adapter that is asked otherwise a folder of its own.
        adapter_name (str, optional): None saves the active adapter.
        as_peft (bool): write what `peft.PeftModel.from_pretrained` loads, without a card: a RoAd adapter without norms
            whose layers all pair in groups of one size.

    Raises:
        ValueError: the model is not patched, the adapter is offloaded or on the meta device, PEFT trains a copy of what
            adapters stand in or train, the folder holds a model, or peft has no such adapter.
        KeyError: the model has no such adapter.
        FloatingPointError: a value is not finite.
        OSError: the files cannot be written.
        Nothing is written then, and an adapter that was there is whole.
    """
    owner, record = patched(model)
    adapter = record.adapter(adapter_name)
    record.check_in_place(model)
    if adapter.lacks_values():
        raise ValueError(
            f"this {type(owner).__name__} is offloaded or on the meta device, and its adapter has no values here to "
            "save: save it before the model is offloaded"
        )
    folder = Path(folder)
    refuse_model_folder(folder)
    theirs = peft_config(model, adapter) if as_peft else None
    parameters = list(adapter.parameters().values())
    with gathered(parameters):
        tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in adapter.tensors().items()}
    broken = not_finite(tensors)
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
        **describe_origin(owner),
        "base": adapter.base,
        "config": asdict(adapter.config),
    }
    write_adapter(folder, description, tensors)


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor with a value that is not finite, in words."""
    return next((f"{name} holds values that are not finite" for name, t in tensors.items() if not _finite(t)), None)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
