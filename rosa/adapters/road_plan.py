"""Where RoAd's modules go in a model: behind linear layers, and where RoPE follows at once, into one launch with it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from rosa.adapters.config import ALL_LINEAR, RoadConfig
from rosa.adapters.layers import chosen_layers
from rosa.adapters.road import Pairing, Road, RopeRoad
from rosa.errors import UnsupportedModelError
from rosa.models.decoder import DecoderLayer, decoder_layers, nearest_config
from rosa.models.linear import LinearSite, linear_sites, output_width, passed_by
from rosa.models.names import plain
from rosa.models.probe import RotaryShape, RotarySite, rotary_sites

NEIGHBOURS = Pairing(2)


class RoadPlan(NamedTuple):
    """RoAd's modules for a model, before one is made."""

    config: RoadConfig
    base: dict[str, int | str | bool]  # the shape of the model
    sites: list[LinearSite]
    pairings: list[Pairing]  # of the sites, in their order
    rotating: list[RotarySite]  # whose queries or keys are outputs of linear layers as they are

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers that are adapted."""
        return [site.layer for site in self.sites]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by full name."""
        return {
            f"{plain(site.name)}.{Road.CHILD}.{weight}": (Road.numbers(self.config.variant, site.width),)
            for site in self.sites
            for weight in ("theta", "alpha")
        }

    def make(self, empty: bool) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The modules, each behind the one that it goes into, by the full name of the latter."""
        variant, dtype = self.config.variant, self.config.torch_dtype
        roads = {}
        for site, pairing in zip(self.sites, self.pairings, strict=True):
            device = next(site.linear.parameters()).device
            roads[site.name] = Road(variant, pairing, site.width, dtype, device, empty=empty)
        made = {plain(site.name): (site.linear, roads[site.name]) for site in self.sites}
        for site in self.rotating:
            before = [roads.get(f"{site.name}.{name}") for name in (site.shape.query, site.shape.key)]
            if any(before) and len({road.pairing for road in before if road is not None}) == 1:
                for road in filter(None, before):
                    road.joined = True
                made[plain(site.name)] = (site.attention, RopeRoad(site.shape.layout, *before))
        return made


def plan_road(model: nn.Module, config: RoadConfig) -> RoadPlan:
    """RoAd's modules for a model.

    Raises:
        ValueError: the configuration does not fit the model.
        UnsupportedModelError: the model cannot be adapted.
    """
    sites = chosen_sites(model, config)
    rotating = _rotating(model)
    pairings = _pairings(model, config, sites, rotating)
    for site, pairing in zip(sites, pairings, strict=True):
        _refuse_offloaded(site)
        fault = pairing.fault(site.width)
        if fault:
            raise ValueError(f"{plain(site.name)} cannot be paired by pairing={config.pairing!r}: {fault}")
    refuse_overwriting(model, config)
    return RoadPlan(config, describe_road(model), sites, pairings, [s for s in rotating if _takes_outputs(s)])


def refuse_overwriting(model: nn.Module, config: RoadConfig) -> None:
    """Refuses RoAd_1 where Liger's gated MLPs would overwrite what it keeps for backward, its own outputs.

    They write their gradients there behind autograd's back.

    Raises:
        ValueError: the variant is 1, and a chosen linear layer is in an MLP whose forward is Liger's.
    """
    for site in chosen_sites(model, config) if config.variant == 1 else ():
        parent = model.get_submodule(site.name.rpartition(".")[0])
        if (getattr(parent.forward, "__module__", None) or "").startswith("liger_kernel"):
            raise ValueError(
                f"RoAd_1 keeps the output of {plain(site.name)} for backward, and Liger's MLP overwrites it; "
                "its gradients would be wrong. Use variant=2, or let Liger leave the MLP alone (swiglu=False or "
                'geglu=False; in TrainingArguments liger_kernel_config={"swiglu": False})'
            )


def chosen_sites(model: nn.Module, config: RoadConfig) -> list[LinearSite]:
    """The linear layers that a configuration chooses.

    Raises:
        ValueError: it names some that there are none of.
        UnsupportedModelError: the model has no decoder layers, or none with linear layers.
    """
    able = able_sites(model)
    sites = able if config.targets == ALL_LINEAR else _named(model, able, config.targets)
    chosen = chosen_layers(model, config.layers, [site.layer for site in sites], "linear layer of these")
    sites = [site for site in sites if site.layer.name in chosen]
    if config.targets == ALL_LINEAR:
        sites = [site for site in sites if site.width % 2 == 0]  # gates of mixtures of experts may have one output
    return sites


def able_sites(model: nn.Module) -> list[LinearSite]:
    """The linear layers whose outputs RoAd can adapt, and merge: wherever the model runs they are what follows sees.

    Raises:
        UnsupportedModelError: the model has no decoder layers, or none with linear layers.
    """
    return [site for site in linear_sites(model) if not passed_by(model, site)]


def describe_road(model: nn.Module) -> dict[str, int | str | bool]:
    """The shape of the model that an adapter of RoAd's must fit, beside the widths of its layers.

    Raises:
        UnsupportedModelError: the model has no decoder layers.
    """
    layers = decoder_layers(model)
    return {"model_type": nearest_config(model, layers[0].name).model_type, "layers": len(layers)}


def _named(model: nn.Module, able: list[LinearSite], targets: tuple[str, ...]) -> list[LinearSite]:
    def matches(name: str, target: str) -> bool:
        return plain(name) == target or plain(name).endswith(f".{target}")

    for target in targets:
        if not any(matches(site.name, target) for site in able):
            elsewhere = next((name for name, m in model.named_modules() if name and matches(name, target)), None)
            reason = "which there is none of" if elsewhere is None else f"but {_why_not(model, elsewhere)}"
            names = sorted({plain(site.name).rpartition(".")[2] for site in able})
            raise ValueError(
                f"targets names {target!r}, {reason}: the linear layers in the decoder layers of this "
                f"{type(model).__name__} are {', '.join(names)}"
            )
    return [site for site in able if any(matches(site.name, target) for target in targets)]


def _why_not(model: nn.Module, name: str) -> str:
    """Why RoAd adapts no module of this name."""
    if any(site.name == name for site in linear_sites(model)):
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        return f"{parent} computes with the weight of {name} itself, and would pass RoAd by"
    module = model.get_submodule(name)
    outside = isinstance(module, nn.Embedding) or output_width(module) is not None
    return f"{name} is {'outside of the decoder layers' if outside else 'no linear layer'}"


def _rotating(model: nn.Module) -> list[RotarySite]:
    try:
        return rotary_sites(model)
    except UnsupportedModelError:  # RoAd needs no rotary attention
        return []


def _takes_outputs(site: RotarySite) -> bool:
    """Whether RoAd may go into one launch with the site's rotation."""
    shape = site.shape
    return shape.key_heads > 0 and (shape.query, shape.key) != (None, None) and not shape.layout.deinterleaves


def _pairings(
    model: nn.Module, config: RoadConfig, sites: list[LinearSite], rotating: list[RotarySite]
) -> list[Pairing]:
    if config.pairing == "neighbours":
        return [NEIGHBOURS] * len(sites)
    if isinstance(config.pairing, int):
        return [Pairing(config.pairing)] * len(sites)
    if not rotating:
        raise ValueError(
            f"pairing={config.pairing!r} follows the heads that RoPE rotates, and {type(model).__name__} has none: use "
            'pairing="neighbours" or a group size'
        )
    if config.pairing == "half":
        return [Pairing(rotating[0].shape.head_dim)] * len(sites)
    return _rope_pairings(sites, rotating)


def _rope_pairings(sites: list[LinearSite], rotating: list[RotarySite]) -> list[Pairing]:
    """The rotary pairs of each layer that makes queries or keys; neighbours of all others."""
    by_name = {}
    for attention in rotating:
        shape = attention.shape
        more = shape.query is None or (shape.key is None and shape.key_heads)
        if more and any(site.name.startswith(f"{attention.name}.") for site in sites):
            raise ValueError(
                f'pairing="rope" is for linear layers whose outputs RoPE rotates as they are, and in '
                f"{plain(attention.name)} there is more between, such as a norm, or one layer makes several: use "
                'pairing="neighbours"'
            )
        by_name |= {f"{attention.name}.{name}": _rotary_pairing(shape) for name in (shape.query, shape.key) if name}
    if not any(site.name in by_name for site in sites):
        raise ValueError('pairing="rope" pairs queries and keys, which none of the targets makes: leave it out')
    return [by_name.get(site.name, NEIGHBOURS) for site in sites]


def _rotary_pairing(shape: RotaryShape) -> Pairing:
    layout = shape.layout
    if layout.interleaved or layout.deinterleaves:
        return NEIGHBOURS
    return Pairing(layout.rotary_dim, None if layout.rotary_dim == shape.head_dim else shape.head_dim)


def _refuse_offloaded(site: LinearSite) -> None:
    offloaded = next(site.linear.parameters()).is_meta and hasattr(site.linear, "_hf_hook")
    if offloaded:
        raise UnsupportedModelError(
            f"{site.name} is offloaded to the CPU or to disk; RoAd trains models in device memory. To generate, patch "
            "the model or load its adapter first, and offload it then"
        )
