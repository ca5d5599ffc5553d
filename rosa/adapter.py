"""Adapters on disk: a folder with `adapter_model.safetensors`, `adapter_config.json` and a model card, `README.md`.

The configuration stands in the weights' own metadata too, so that replacing that one file replaces the adapter: a
process that is killed while it saves leaves the old adapter or the new one. `adapter_config.json` is the copy for
people and for the hub.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rosa import zero
from rosa.card import MARK, model_card
from rosa.config import RosaConfig
from rosa.errors import AdapterError
from rosa.parallel import shard_like, whole
from rosa.patching import add_adapter, base_name, describe_base, is_patched, make_adapter
from rosa.record import patched

FORMAT_VERSION = 1
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Saves what RoSA trained in a patched model, the RoAE weights and, if trained, the norms; with a model card.

    Of a model sharded by FSDP2 or ZeRO-3 every rank calls this, and the first one writes.

    Args:
        model (nn.Module): a patched model, wrapped or not; the names in the file are those of the plain model.
        folder (path): made if need be; an adapter in it is replaced, at once or, if the process is killed, not at all.
            A README.md that somebody else wrote stays as it is.
        adapter_name (str, optional): None saves the active adapter.

    Raises:
        ValueError: the model is not patched, or the adapter stands on the meta device.
        KeyError: the model has no such adapter.
        OSError: the files cannot be written. An adapter that was there is whole.
    """
    adapter = patched(model)[1].adapter(adapter_name)
    if any(tensor.is_meta for tensor in adapter.tensors().values()):
        raise ValueError("this model is on the meta device: its adapter has no values to save")
    parameters = list(adapter.parameters().values())
    with zero.gathered(parameters):
        tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in adapter.tensors().items()}
    if any(isinstance(p, DTensor) or zero.is_partitioned(p) for p in parameters) and dist.get_rank() != 0:
        return
    description = {
        "adapter_type": "rosa",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": base_name(model),
        "base": describe_base(model),
        "config": asdict(adapter.config),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, description, tensors)


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
        source (path or str): a folder that `save_adapter` wrote, or a repository of the Hugging Face hub ("user/name").
        adapter_name (str): its name in the model.
        revision (str, optional): branch, tag or commit on the hub; None is "main".
        token (str, optional): for the hub; None takes the one that `hf auth login` stored, or HF_TOKEN.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        AdapterError: a damaged file, an unknown format version, or an adapter for another base model.
        ValueError: the model has an adapter of this name with another configuration, the name does not fit, or
            DeepSpeed has the parameters.
        Nothing is changed after an error.
    """
    description, tensors = _read(local_folder(source, revision, token))
    config = _config(description, source)
    _check_base(model, description, source)
    record = patched(model)[1] if is_patched(model) else None
    known = record is not None and adapter_name in record.adapters
    if known:
        adapter = record.adapters[adapter_name]
        if adapter.config != config:
            raise ValueError(f"this model is patched with {adapter.config}, the adapter in {source} has {config}")
        if adapter_name != record.active:
            record.check_switchable(model)
    else:
        adapter = make_adapter(model, config, adapter_name)
    if any(zero.is_managed(p) for p in adapter.parameters().values()):
        raise ValueError(
            f"DeepSpeed keeps the parameters of this {type(model).__name__} already, and would not see other values: "
            "load the adapter before deepspeed.initialize, and not under ZeRO-3's Init"
        )
    mismatch = _mismatch(adapter.tensors(), tensors)
    if mismatch:
        raise AdapterError(f"the weights in {source} do not fit this {type(model).__name__}: {mismatch}")

    for name, tensor in adapter.tensors().items():
        tensor.copy_(shard_like(tensors[name], tensor))
    if not known:
        add_adapter(model, adapter_name, adapter)
    elif adapter_name != record.active:
        record.switch(adapter_name)
    return model


def has_adapter(folder: str | os.PathLike) -> bool:
    """Whether the folder holds an adapter, or part of one."""
    return any((Path(folder) / name).exists() for name in (WEIGHTS_NAME, CONFIG_NAME))


def refuse_model_folder(folder: Path) -> None:
    """Refuses to write into the folder of a model, whose tokenizer an adapter's would replace.

    Raises:
        ValueError: it holds a model.
    """
    names = ("*.safetensors", "*.bin")
    beside = {path.name for name in names for path in folder.glob(name)} - {"training_args.bin"}
    weights = sorted(name for name in beside if not name.startswith("adapter_model."))
    if weights and (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a model (config.json, {weights[0]}): choose another folder")


def local_folder(source: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of an adapter, RoSA's or peft's; one on the hub is fetched first.

    Args:
        source (path or str): a folder, or a repository of the Hugging Face hub ("user/name").
        revision (str, optional): branch, tag or commit on the hub.
        token (str, optional): for the hub.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    name = os.fspath(source)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            files = [WEIGHTS_NAME, CONFIG_NAME]
            return Path(snapshot_download(name, allow_patterns=files, revision=revision, token=token))
        except Exception as error:
            raise FileNotFoundError(f"{name} is neither a folder here nor to be had from the hub: {error}") from error
    raise FileNotFoundError(f"there is no adapter folder {name}")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no complete adapter: {name} is missing")
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            text = (file.metadata() or {})["adapter_config"]
            description, tensors = json.loads(text), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS_NAME} is truncated or no safetensors file: {error}") from error
    except (KeyError, ValueError) as error:
        raise AdapterError(f"{folder / WEIGHTS_NAME} carries no RoSA configuration in its metadata") from error
    if not (isinstance(description, dict) and isinstance(description.get("base"), dict)):
        raise AdapterError(f"{folder / WEIGHTS_NAME} carries a RoSA configuration without a base: {text[:80]}")
    if (folder / CONFIG_NAME).read_text(encoding="utf-8").strip() != text:
        warnings.warn(
            f"{folder / CONFIG_NAME} differs from the configuration stored with the weights, which is used",
            stacklevel=3,
        )
    return description, tensors


def _config(description: dict[str, Any], source: str | os.PathLike) -> RosaConfig:
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"the adapter in {source} has format version {version}, this RoSA reads {FORMAT_VERSION}: "
            "load it with the version of RoSA that wrote it, or a newer one"
        )
    try:
        return RosaConfig(**description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"the adapter in {source} has an unusable configuration: {error}") from error


def _check_base(model: nn.Module, description: dict[str, Any], source: str | os.PathLike) -> None:
    here, theirs = describe_base(model), description.get("base_model_name_or_path") or "its base"
    differences = [
        f"{field} is {here.get(field)} in this {type(model).__name__}, {expected} in {theirs}"
        for field, expected in description["base"].items()
        if here.get(field) != expected
    ]
    if differences:
        raise AdapterError(f"the adapter in {source} was made for another base: {'; '.join(differences)}")


def _mismatch(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> str | None:
    """The first thing, in words, in which the tensors on disk differ from those that the model has a place for."""
    for name, tensor in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != tensor.shape:
            return f"{name} is {list(tensors[name].shape)}, expected {list(tensor.shape)}"
    return next((f"{name} has no place in the model" for name in tensors if name not in expected), None)


def _write(folder: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    text = json.dumps(description, indent=2)
    card, config, weights = folder / CARD_NAME, folder / CONFIG_NAME, folder / WEIGHTS_NAME
    try:
        # One key of metadata: safetensors writes several in any order, and equal adapters should be equal files. Not
        # save_file: that has a temporary file of its own, under a name that nobody could clean up after a kill.
        _temporary(weights).write_bytes(save(tensors, metadata={"adapter_config": text}))
        _temporary(config).write_text(text + "\n", encoding="utf-8")
        if not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace"):
            _temporary(card).write_text(model_card(description, tensors), encoding="utf-8")
            _replace(card)
        for path in (config, weights):  # the weights last: they are what makes it the new adapter
            _replace(path)
    except OSError as error:
        raise OSError(f"the adapter could not be saved in {folder}: {error}. One that was there is whole") from error
    finally:  # also what a killed process has left
        for path in (card, config, weights):
            _temporary(path).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _replace(path: Path) -> None:
    """Puts the temporary file in the path's place, once it is on the disk in full."""
    with open(_temporary(path), "rb") as file:
        os.fsync(file.fileno())
    os.replace(_temporary(path), path)
