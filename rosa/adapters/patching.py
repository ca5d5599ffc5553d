"""`patch` and `unpatch`: RoSA on a model and off it again, in place."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from torch import Tensor, nn

from rosa.adapters.config import RosaConfig
from rosa.adapters.record import ADAPTER_NAME, Adapter, Patch, is_patched, patched, trained_weight
from rosa.adapters.roae import RoAE
from rosa.adapters.save_pretrained import save_pretrained_saves_adapters
from rosa.errors import UnsupportedModelError
from rosa.models.decoder import decoder_layers
from rosa.models.probe import RotarySite, nearest_config, rotary_sites
from rosa.models.rotary import RotaryLayout
from rosa.models.sharding import check_not_sharded
from rosa.models.trainable import keep_unpacked, refuse_inference_mode, refuse_layers_without_backward

# What wrappers inside a model put into names: torch.compile, activation checkpoints, FSDP1, and PEFT's tuners.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}


def patch(model: nn.Module, config: RosaConfig | None = None, adapter_name: str = "default") -> nn.Module:
    """Adds RoSA to a Hugging Face model in place: freezes it, adds a `roae` module to each attention layer, and lets
    the norms of the adapted decoder layers train. The model computes what it computed before until it is trained.
    PEFT's adapters in it go on to train.

    A model that is patched already gets a second adapter, under another name, which is the active one from then on:
    see `set_adapter`.

    Args:
        model (nn.Module): a model of transformers with rotary attention, of any floating dtype, on any device or
            several, or on the meta device; wrapped or not.
        config (RosaConfig, optional): None takes the paper's defaults.
        adapter_name (str): of letters, digits, "_" and "-".

    Returns:
        The same model.

    Raises:
        TypeError: `config` is no RosaConfig.
        ValueError: the model has an adapter of this name, is part of a model that is patched, or the name or the
            configuration does not fit; or this is inside `torch.inference_mode()`.
        UnsupportedModelError: the model cannot be adapted.
        Nothing is changed after an error.
    """
    add_adapter(model, adapter_name, make_adapter(plan_adapter(model, config, adapter_name)))
    return model


class Plan(NamedTuple):
    """An adapter that fits a model, before anything is made for it."""

    config: RosaConfig
    base: dict[str, int | str | bool]  # the shape of the model
    sites: dict[str, RotarySite]  # by the names of the attention modules
    norms: dict[str, nn.Module]  # that it trains, by the full names of their weights
    base_weights: dict[str, Tensor]  # of norms that hold another adapter's

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of everything that the adapter learns, by full name."""
        modules = {name: RoAE.shapes(self.config, *_sizes(site)) for name, site in self.sites.items()}
        own = {f"{name}.{ADAPTER_NAME}.{w}": shape for name, shapes in modules.items() for w, shape in shapes.items()}
        return own | {name: tuple(norm.weight.shape) for name, norm in self.norms.items()}


def plan_adapter(model: nn.Module, config: RosaConfig | None, adapter_name: str) -> Plan:
    """The adapter that `patch` adds, not made yet: all of `patch` that can fail."""
    config = RosaConfig() if config is None else config
    if not isinstance(config, RosaConfig):
        raise TypeError(f"config must be a rosa.RosaConfig, got {type(config).__name__}")
    if not isinstance(adapter_name, str) or not re.fullmatch(r"[\w-]+", adapter_name):
        raise ValueError(f"adapter_name must be letters, digits, '_' and '-', got {adapter_name!r}")
    owner, record = patched(model) if is_patched(model) else (_unwrapped(model), None)
    base_weights = {}
    if record is not None:
        if adapter_name in record.adapters:
            raise ValueError(
                f"this {type(model).__name__} is patched already; call rosa.unpatch(model) first, or add another "
                f"adapter under another adapter_name than {adapter_name!r}"
            )
        record.check_switchable(model)
        base_weights = {name: weight.data for name, weight in record.active_adapter.weights.items()}

    refuse_inference_mode(owner)
    refuse_layers_without_backward(owner)
    rotating = rotary_sites(owner)
    sites = _adapted_sites(owner, rotating, config)
    for site in sites:
        _refuse_offloaded_site(site)
    plan = Plan(
        config,
        base=_described(owner, rotating),
        sites={_plain(site.name): site for site in sites},
        norms=_trained_norms(sites) if config.train_norms else {},
        base_weights=base_weights,
    )
    plan.shapes()  # r_low may leave no pair
    return plan


def make_adapter(plan: Plan, *, empty: bool = False) -> Adapter:
    """The adapter of a plan, not attached yet; `empty` leaves its modules without values."""
    config = plan.config
    modules = {}
    for name, site in plan.sites.items():
        device = next(site.attention.parameters()).device
        modules[name] = RoAE(config, *_sizes(site), device, empty=empty).train(site.attention.training)
    return Adapter(
        config,
        base=plan.base,
        attentions={name: site.attention for name, site in plan.sites.items()},
        modules=modules,
        norms=plan.norms,
        weights={
            name: trained_weight(norm, plan.base_weights.get(name, norm.weight), config.torch_dtype)
            for name, norm in plan.norms.items()
        },
    )


def add_adapter(model: nn.Module, adapter_name: str, adapter: Adapter) -> None:
    """Adds what `make_adapter` made and switches it in; the first adapter freezes the model."""
    if not is_patched(model):
        owner = _unwrapped(model)
        # PEFT has frozen a base that carries its adapters, and may rename parameters until `unpatch`.
        frozen = {} if hasattr(owner, "peft_config") else dict(owner.named_parameters())
        flags = {name: p.requires_grad for name, p in frozen.items()}
        owner._rosa = Patch(type(owner).__name__, flags, hooks=[keep_unpacked(owner)])
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        save_pretrained_saves_adapters()
    patched(model)[1].add(adapter_name, adapter)


def unpatch(model: nn.Module) -> nn.Module:
    """Takes RoSA off a model in place, with all its adapters: its modules, its hooks, its norm weights and
    requires_grad flags are as before.

    Norms of a model that was patched on the meta device keep their values: there were none before.

    Raises:
        ValueError: the model is not patched, is sharded, is inside `disabled`, or parameters were renamed since.
            Nothing is changed then.
    """
    owner, record = patched(model)
    parameters = dict(owner.named_parameters())
    renamed = [name for name in record.requires_grad if name not in parameters]
    if renamed:
        raise ValueError(
            f"{len(renamed)} parameters of this {type(owner).__name__} have other names since it was patched, "
            f"{renamed[0]} among them: undo what renamed them first (a PEFT model's `unload`, for example)"
        )
    record.check_enabled()
    check_not_sharded(model)
    record.remove()
    for name, flag in record.requires_grad.items():
        parameters[name].requires_grad_(flag)
    del owner._rosa
    return model


def base_name(model: nn.Module) -> str | None:
    """The name or path that the patched model was loaded from, as far as it has one."""
    return getattr(getattr(patched(model)[0], "config", None), "name_or_path", None) or None


def describe_base(model: nn.Module) -> dict[str, int | str | bool]:
    """The shape of the model that an adapter must fit: its type, layers, and its first attention's widths, heads and
    rotary layout; of a patched model as it was found then, whatever has replaced its rotary function since.

    Raises:
        UnsupportedModelError: the model has no rotary attention that RoSA can adapt.
    """
    return patched(model)[1].active_adapter.base if is_patched(model) else _described(model, rotary_sites(model))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, or torch.compile's, DDP's or DeepSpeed's, which are modules with one child."""
    from transformers import PreTrainedModel  # takes seconds, and by now it has been imported

    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # PEFT's, which may hold a learned prompt beside the model
            model = model.get_base_model()
        elif len(children := list(model.children())) == 1:
            (model,) = children
        else:
            break
    return model


def _plain(name: str) -> str:
    """A module's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


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


def _adapted_sites(model: nn.Module, sites: list[RotarySite], config: RosaConfig) -> list[RotarySite]:
    if config.layers is None:
        return sites
    layers = [layer.name for layer in decoder_layers(model)]
    if config.layers[-1] >= len(layers):
        raise ValueError(
            f"layers names layer {config.layers[-1]}, but {type(model).__name__} has {len(layers)} (from 0)"
        )
    without = [i for i in config.layers if not any(site.layer.name == layers[i] for site in sites)]
    if without:
        raise ValueError(f"layers names {without}, which have no rotary attention in {type(model).__name__}")
    chosen = {layers[i] for i in config.layers}
    return [site for site in sites if site.layer.name in chosen]


def _trained_norms(sites: list[RotarySite]) -> dict[str, nn.Module]:
    """The norms of the adapted layers by the full names of their weights; not those that share one, as the repeated
    blocks of Zamba 2 do."""
    norms = {f"{_plain(name)}.weight": norm for site in sites for name, norm in site.layer.norms.items()}
    shared = Counter(id(norm.weight) for norm in norms.values())
    return {name: norm for name, norm in norms.items() if shared[id(norm.weight)] == 1}


def _sizes(site: RotarySite) -> tuple[int, int, int, RotaryLayout]:
    """What RoAE wants to know of an attention module."""
    hidden_size, heads, key_heads, _, layout = site.shape
    return hidden_size, heads, key_heads, layout


def _refuse_offloaded_site(site: RotarySite) -> None:
    device = next(site.attention.parameters()).device
    if device.type == "meta" and any(hasattr(module, "_hf_hook") for module in site.attention.modules()):
        raise UnsupportedModelError(
            f"{site.name} is offloaded to the CPU or to disk; RoSA trains models in device memory. To generate, patch "
            "the model or load its adapter first, and offload it then"
        )
