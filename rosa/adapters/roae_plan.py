"""Where RoSA's modules go in a model: into every attention module that rotates."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from rosa.adapters.config import RosaConfig
from rosa.adapters.layers import chosen_layers
from rosa.adapters.roae import RoAE
from rosa.errors import UnsupportedModelError
from rosa.models.decoder import DecoderLayer, nearest_config
from rosa.models.names import plain
from rosa.models.probe import RotarySite, rotary_sites
from rosa.models.rotary import RotaryLayout


class RoaePlan(NamedTuple):
    """RoSA's modules for a model, before one is made."""

    config: RosaConfig
    base: dict[str, int | str | bool]  # the shape of the model
    sites: list[RotarySite]

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers that are adapted."""
        return [site.layer for site in self.sites]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by full name."""
        return {
            f"{plain(site.name)}.{RoAE.CHILD}.{weight}": shape
            for site in self.sites
            for weight, shape in RoAE.shapes(self.config, *_sizes(site)).items()
        }

    def make(self, empty: bool) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The modules, each behind the one that it goes into, by the full name of the latter."""
        made = {}
        for site in self.sites:
            device = next(site.attention.parameters()).device
            made[plain(site.name)] = (site.attention, RoAE(self.config, *_sizes(site), device, empty=empty))
        return made


def plan_roae(model: nn.Module, config: RosaConfig) -> RoaePlan:
    """RoSA's modules for a model.

    Raises:
        ValueError: the configuration does not fit the model.
        UnsupportedModelError: the model cannot be adapted.
    """
    rotating = rotary_sites(model)
    chosen = chosen_layers(model, config.layers, [site.layer for site in rotating], "rotary attention")
    sites = [site for site in rotating if site.layer.name in chosen]
    for site in sites:
        _refuse_offloaded(site)
    plan = RoaePlan(config, _described(model, rotating), sites)
    plan.shapes()  # r_low may leave no pair
    return plan


def describe_roae(model: nn.Module) -> dict[str, int | str | bool]:
    """The shape of the model that an adapter of RoSA's must fit: its type, layers, and its first attention's widths,
    heads and rotary layout.

    Raises:
        UnsupportedModelError: the model has no rotary attention that RoSA can adapt.
    """
    return _described(model, rotary_sites(model))


def _described(model: nn.Module, sites: list[RotarySite]) -> dict[str, int | str | bool]:
    shape = sites[0].shape
    return {
        "model_type": nearest_config(model, sites[0].name).model_type,
        "layers": len({site.layer.name for site in sites}),
        "hidden_size": shape.hidden_size,
        "heads": shape.heads,
        "key_heads": shape.key_heads,
        "head_dim": shape.head_dim,
        **shape.layout._asdict(),
    }


def _sizes(site: RotarySite) -> tuple[int, int, int, RotaryLayout]:
    """What RoAE wants to know of an attention module."""
    shape = site.shape
    return shape.hidden_size, shape.heads, shape.key_heads, shape.layout


def _refuse_offloaded(site: RotarySite) -> None:
    device = next(site.attention.parameters()).device
    if device.type == "meta" and any(hasattr(module, "_hf_hook") for module in site.attention.modules()):
        raise UnsupportedModelError(
            f"{site.name} is offloaded to the CPU or to disk; RoSA trains models in device memory. To generate, patch "
            "the model or load its adapter first, and offload it then"
        )
