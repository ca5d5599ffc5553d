"""Compositions on disk: `composition.safetensors`, whose metadata says what it is, and a copy of that for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rosa.adapters.base import describe_origin
from rosa.adapters.folder import refuse_model_folder
from rosa.composition.compose import Composition, compose, composed
from rosa.composition.division import Division, plan_division
from rosa.errors import AdapterError
from rosa.storage.files import replace_files
from rosa.storage.parsing import parse_object

WEIGHTS_NAME = "composition.safetensors"
DESCRIPTION_NAME = "composition.json"
FORMAT_VERSION = 1
_KEY = "composition"  # of the weights' metadata


def save_composition(model: nn.Module, folder: str | os.PathLike) -> None:
    """Saves the angles and scales of a composed model, and how it is divided.

    Args:
        model (nn.Module): a composed model, wrapped or not.
        folder (path): made if need be; a composition in it is replaced, at once or not at all.

    Raises:
        ValueError: the model is not composed, or the folder holds a model.
        FloatingPointError: a value is not finite.
        OSError: the files cannot be written.
        Nothing is written then, and a composition that was there is whole.
    """
    owner, record = composed(model)
    folder = Path(folder)
    refuse_model_folder(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(record).items()}
    broken = _not_finite(tensors)
    if broken:
        raise FloatingPointError(f"{broken}, so the composition was not saved; what was in {folder} is as it was")
    description = {"format_version": FORMAT_VERSION, **describe_origin(owner), **record.division._asdict()}
    text = json.dumps(description, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    copy = (text + "\n").encode("utf-8")
    # The weights last, which makes it the new composition.
    replace_files({folder / DESCRIPTION_NAME: copy, folder / WEIGHTS_NAME: save(tensors, metadata={_KEY: text})})


def load_composition(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Composes a model with what `save_composition` wrote; it can be trained on.

    Args:
        model (PreTrainedModel): as for `compose`, of the width and depth of the one that was saved.
        folder (path): of the composition.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no composition in the folder.
        AdapterError: it is damaged, of an unknown format version, not finite, or for another model.
        ValueError: the model is composed already, or carries adapters of RoSA's.
        Nothing is changed after an error.
    """
    file = Path(folder) / WEIGHTS_NAME
    description, tensors = _read(file)
    division = _division(model, description, file)
    wrong = _mismatch(tensors, division)
    if wrong:
        raise AdapterError(f"the weights in {file} do not fit its description: {wrong}")
    broken = _not_finite(tensors)
    if broken:
        raise AdapterError(f"{file} is of no use: {broken}")
    compose(model, division.shares, division.layers, division.positions)
    with torch.no_grad():
        for name, place in _tensors(composed(model)[1]).items():
            place.copy_(tensors[name])
    return model


def read_composition(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder says of its composition.

    Raises:
        FileNotFoundError, AdapterError: as `load_composition` does.
    """
    return _read(Path(folder) / WEIGHTS_NAME)[0]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no composition: {file.name} is missing")
    try:
        with safe_open(file, framework="pt") as stored:
            text = (stored.metadata() or {}).get(_KEY, "")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise AdapterError(f"{file} is truncated or no safetensors file: {error}") from error
    try:
        return parse_object(text), tensors
    except ValueError as error:
        raise AdapterError(f"{file} carries no description of a composition: {error}") from error


def _tensors(record: Composition) -> dict[str, Tensor]:
    rotations = record.rotations.items()
    return {f"layers.{n}.{name}": tensor for n, rotation in rotations for name, tensor in rotation.named_parameters()}


def _division(model: nn.Module, description: dict[str, Any], file: Path) -> Division:
    """The division that a file describes, which must be one that the model can have."""
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(f"{file} has format version {version!r}, this RoSA reads {FORMAT_VERSION}")
    missing = [name for name in Division._fields if name not in description]
    if missing:
        raise AdapterError(f"{file} does not say {', '.join(missing)}")
    here = plan_division(model, ("any",), 0, 1)  # raises for a model that takes no composition at all
    for name in ("width", "depth"):
        if description[name] != getattr(here, name):
            raise AdapterError(
                f"{file} was made for another model: its {name} is {description[name]!r}, that of this "
                f"{type(model).__name__} is {getattr(here, name)}"
            )
    return _checked(model, description, file)


def _checked(model: nn.Module, description: dict[str, Any], file: Path) -> Division:
    shares, layers, positions = (description[name] for name in ("shares", "layers", "positions"))
    if not isinstance(shares, dict) or not isinstance(layers, list):
        raise AdapterError(f"{file} has an unusable description: shares is {shares!r}, layers is {layers!r}")
    try:
        return plan_division(model, shares, layers, positions)
    except ValueError as error:
        raise AdapterError(f"{file} has an unusable description: {error}") from error


def _mismatch(tensors: dict[str, Tensor], division: Division) -> str | None:
    """The first thing, in words, in which the tensors differ from those that a division has."""
    expected = [f"layers.{n}.{name}" for n in division.layers for name in ("theta", "alpha")]
    for name in expected:
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != (division.pairs,) or not tensors[name].is_floating_point():
            return f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, expected numbers [{division.pairs}]"
    return next((f"{name} has no place in the model" for name in tensors if name not in expected), None)


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor with a value that is not finite, in words."""
    return next((f"{n} holds values that are not finite" for n, t in tensors.items() if not t.isfinite().all()), None)
