"""RoAd's adapters in peft's form: `adapter_config.json`, and weights by peft's names in its order of the numbers.

Variants 1 and 2 have theta and alpha in the same order as here. Of variant 4, peft has the cosine and the sine terms of
one group after another, where a `Road` has all cosine terms and then all sine terms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rosa.adapters.base import NAME, REVISION, describe_origin
from rosa.adapters.config import ALL_LINEAR, RoadConfig
from rosa.adapters.folder import FORMAT_VERSION, WEIGHTS_NAME, StoredAdapter, read_description
from rosa.adapters.plan import describe_base, method_of, unwrapped
from rosa.adapters.record import Adapter, is_patched, patched
from rosa.adapters.road import Pairing, Road
from rosa.adapters.road_plan import NEIGHBOURS, able_sites, chosen_sites
from rosa.errors import AdapterError
from rosa.models.decoder import decoder_layers
from rosa.models.linear import is_conv1d
from rosa.models.names import plain

PEFT_TYPE = "ROAD"
VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}
_PREFIX = "base_model.model."  # peft's wrapper
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.road_(?:theta|alpha)")


@contextmanager
def open_peft_road(folder: Path, model: nn.Module) -> Iterator[StoredAdapter]:
    """An adapter that peft's RoAd saved, described and named as ours are, to be read in the block.

    Which layers it adapts is read off the names in the file, not off the patterns that peft chose them by. Of its base
    peft says nothing but a name: any model will do that has these layers.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterError: a damaged file, an adapter of another kind, or one for layers that the model does not have.
    """
    try:
        theirs = read_description(folder)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    if theirs.get("peft_type") != PEFT_TYPE:
        raise AdapterError(
            f"{folder} holds an adapter that peft made, of type {theirs.get('peft_type')!r}, and only its {PEFT_TYPE} "
            "is known here: load it with peft.PeftModel.from_pretrained"
        )
    weights = folder / WEIGHTS_NAME
    try:
        with safe_open(weights, framework="pt") as file:
            try:
                config = _our_config(model, theirs, file)
            except ValueError as error:
                raise AdapterError(f"the adapter that peft made in {folder} is of no use here: {error}") from error
            description = {
                "format_version": FORMAT_VERSION,
                "method": method_of(config),
                **{field: theirs.get(field) for field in (NAME, REVISION)},
                "base": describe_base(model, config),
                "config": asdict(config),
            }
            yield StoredAdapter(description, _Renamed(file, config.variant, theirs["group_size"]))
    except SafetensorError as error:
        raise AdapterError(f"{weights} is truncated or no safetensors file: {error}") from error


def peft_config(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """peft's configuration of an adapter of a patched model.

    Raises:
        ValueError: peft has no such adapter.
    """
    if not isinstance(adapter.config, RoadConfig):
        raise ValueError("only RoAd's adapters have a form in peft, and this one is RoSA's: save it without as_peft")
    if adapter.norms:
        raise ValueError(
            f"peft's RoAd trains no norms, and this adapter has {len(adapter.norms)} of them: save it without as_peft"
        )
    roads = {name: module for name, module in adapter.modules.items() if isinstance(module, Road)}
    transposed = next((name for name in roads if is_conv1d(adapter.hosts[name])), None)
    if transposed is not None:
        raise ValueError(f"peft's RoAd is for torch.nn.Linear, and {transposed} is a Conv1D: save it without as_peft")
    group, owner = _one_group(roads), patched(model)[0]
    return {
        **describe_origin(owner),
        "group_size": group,
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": None,
        "peft_type": PEFT_TYPE,
        "target_modules": list(roads),
        "task_type": "CAUSAL_LM" if type(owner).__name__.endswith("ForCausalLM") else None,
        "variant": f"road_{adapter.config.variant}",
    }


def in_peft_order(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """What an adapter has learned by peft's names, in its order.

    Args:
        tensors (dict of Tensor): by our names.
        config (dict): as `peft_config` gives it.
    """
    if config["variant"] == "road_4":
        turned = {name: t.view(2, -1, config["group_size"]).transpose(0, 1) for name, t in tensors.items()}
        tensors = {name: t.reshape(-1) for name, t in turned.items()}
    return {_their_name(name): tensor for name, tensor in tensors.items()}


class _Renamed(NamedTuple):
    """A file of peft's, as StoredAdapter asks for names, shapes and tensors of ours."""

    file: safe_open
    variant: int
    group: int

    def keys(self) -> list[str]:
        return [_our_name(key) for key in self.file.keys()]  # noqa: SIM118

    def get_slice(self, name: str) -> Any:
        return self.file.get_slice(_their_name(name))

    def get_tensor(self, name: str) -> Tensor:
        tensor = self.file.get_tensor(_their_name(name))
        return tensor.view(-1, 2, self.group).transpose(0, 1).reshape(-1) if self.variant == 4 else tensor


def _our_config(model: nn.Module, theirs: dict[str, Any], file: safe_open) -> RoadConfig:
    """The shortest configuration that adapts exactly the layers in the file.

    Raises:
        ValueError: there is none.
    """
    variant, group = theirs.get("variant"), theirs.get("group_size")
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"its variant is {variant!r}, known are {', '.join(VARIANTS)}")
    if type(group) is not int or group < 2 or group % 2:
        raise ValueError(f"its group_size is {group!r}, expected an even number from 2")
    keys = {key: _KEY.fullmatch(key) for key in file.keys()}  # noqa: SIM118
    foreign = next((key for key, match in keys.items() if match is None), None)
    if foreign is not None or not keys:
        raise ValueError(f"its weights hold {foreign or 'nothing'}, expected road_theta and road_alpha of layers")
    names = {match[1] for match in keys.values()}
    owner = patched(model)[0] if is_patched(model) else unwrapped(model)
    able = {plain(site.name): site for site in able_sites(owner)}
    for name in sorted(names):
        if name not in able:
            raise ValueError(f"{name} is no linear layer in the decoder layers of this {type(owner).__name__}")
        fault = Pairing(group).fault(able[name].width)
        if fault:
            raise ValueError(f"{name} cannot be paired in groups of {group}: {fault}")
    pairing = "neighbours" if group == NEIGHBOURS.group else group
    dtype = "float64" if any(file.get_slice(key).get_dtype() == "F64" for key in keys) else "float32"
    config = RoadConfig(VARIANTS[variant], pairing=pairing, adapter_dtype=dtype)
    named = [name for name in able if name in names]  # in the model's order
    ends = [name.rpartition(".")[2] for name in named]
    places = {layer.name: i for i, layer in enumerate(decoder_layers(owner))}
    layers = {places[able[name].layer.name] for name in named}
    layers = None if layers == {places[site.layer.name] for site in able.values()} else layers
    for targets, chosen in ((ALL_LINEAR, layers), (ends, layers), (named, None)):
        config = replace(config, targets=targets, layers=chosen)
        if {plain(site.name) for site in chosen_sites(owner, config)} == names:
            break
    return config


def _one_group(roads: dict[str, Road]) -> int:
    """The group size that all layers have."""
    first = next(iter(roads))
    for name, road in roads.items():
        if road.pairing.head_dim is not None:
            raise ValueError(
                f"peft pairs within equal groups, and {name} pairs {road.pairing.group} of {road.pairing.head_dim} "
                'elements a head as RoPE does: an adapter for peft wants pairing="neighbours" or a group size'
            )
        if road.pairing != roads[first].pairing:
            raise ValueError(
                f"peft has one group size for all layers, and this adapter pairs {first} in groups of "
                f"{roads[first].pairing.group} and {name} in groups of {road.pairing.group}"
            )
    return roads[first].pairing.group


def _their_name(name: str) -> str:
    host, _, weight = name.rpartition(".")  # `....road`, and theta or alpha
    return f"{_PREFIX}{host}_{weight}"


def _our_name(name: str) -> str:
    host, _, weight = name.removeprefix(_PREFIX).rpartition("_")
    return f"{host}.{weight}"
