"""Adapters on disk: a folder with `adapter_model.safetensors` and `adapter_config.json`.

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

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rosa.config import RosaConfig
from rosa.errors import AdapterError
from rosa.patching import adapter_config, adapter_parameters, base_name, describe_base, is_patched, patch, unpatch

FORMAT_VERSION = 1
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Saves what RoSA trained in a patched model: the RoAE weights and, if trained, the norms.

    Args:
        model (nn.Module): a patched model.
        folder (path): made if need be; an adapter in it is replaced, at once or, if the process is killed, not at all.

    Raises:
        ValueError: the model is not patched, or stands on the meta device.
    """
    parameters = adapter_parameters(model)
    if any(p.is_meta for p in parameters.values()):
        raise ValueError("this model is on the meta device: its adapter has no values to save")
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    description = json.dumps(
        {
            "adapter_type": "rosa",
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": base_name(model),
            "base": describe_base(model),
            "config": asdict(adapter_config(model)),
        },
        indent=2,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    # One key of metadata: safetensors writes several in any order, and equal adapters should be equal files.
    save_file(tensors, _temporary(weights), metadata={"adapter_config": description})
    _temporary(config).write_text(description + "\n", encoding="utf-8")
    for path in (config, weights):  # the weights last: they are what makes it the new adapter
        _replace(path)


def load_adapter(model: nn.Module, source: str | os.PathLike) -> nn.Module:
    """Loads an adapter into a model in place, patching it first if it is not; the adapter can be trained on.

    Args:
        model (nn.Module): a fresh model of the adapter's base, or one patched with the adapter's configuration.
        source (path or str): a folder that `save_adapter` wrote, or a repository of the Hugging Face hub ("user/name").

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        AdapterError: a damaged file, an unknown format version, or an adapter for another base model.
        ValueError: the model is patched with another configuration.
        Nothing is changed after an error.
    """
    description, tensors = _read(_local_folder(source))
    config, base = _config(description, source), describe_base(model)
    for field, expected in description["base"].items():
        if base.get(field) != expected:
            raise AdapterError(
                f"the adapter in {source} was made for another base: {field} is {base.get(field)} in this "
                f"{type(model).__name__}, {expected} in {description.get('base_model_name_or_path') or 'its base'}"
            )
    fresh = not is_patched(model)
    if fresh:
        patch(model, config)
    elif adapter_config(model) != config:
        raise ValueError(f"this model is patched with {adapter_config(model)}, the adapter in {source} has {config}")
    parameters = adapter_parameters(model)
    mismatch = _mismatch(parameters, tensors)
    if mismatch:
        if fresh:
            unpatch(model)
        raise AdapterError(f"the weights in {source} do not fit this {type(model).__name__}: {mismatch}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model


def has_adapter(folder: str | os.PathLike) -> bool:
    """Whether the folder holds an adapter, or part of one."""
    return any((Path(folder) / name).exists() for name in (WEIGHTS_NAME, CONFIG_NAME))


def _local_folder(source: str | os.PathLike) -> Path:
    if Path(source).is_dir():
        return Path(source)
    name = os.fspath(source)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            return Path(snapshot_download(name, allow_patterns=[WEIGHTS_NAME, CONFIG_NAME]))
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


def _mismatch(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> str | None:
    """The first thing, in words, in which the tensors on disk differ from the model's parameters."""
    for name, parameter in parameters.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != parameter.shape:
            return f"{name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}"
    return next((f"{name} has no place in the model" for name in tensors if name not in parameters), None)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _replace(path: Path) -> None:
    """Puts the temporary file in the path's place, once it is on the disk in full."""
    with open(_temporary(path), "rb") as file:
        os.fsync(file.fileno())
    os.replace(_temporary(path), path)
