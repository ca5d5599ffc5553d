"""`patch` and `unpatch`: RoSA on a model and off it again, in place; and what of a patched model is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.config import RosaConfig
from rosa.decoder import decoder_layers
from rosa.errors import UnsupportedModelError
from rosa.probe import RotarySite, rotary_sites
from rosa.roae import RoAE
from rosa.rotary import attach

ADAPTER_NAME = "roae"


@dataclass
class Patch:
    """What `patch` did to a model, kept on it as `_rosa`: enough to save the adapter and to undo it."""

    config: RosaConfig
    attentions: list[str]
    norms: dict[str, Tensor]  # names of the trained norm weights, and what they held before
    requires_grad: dict[str, bool]  # of every parameter, before
    hooks: list[RemovableHandle]


def patch(model: nn.Module, config: RosaConfig | None = None) -> nn.Module:
    """Adds RoSA to a Hugging Face model in place: freezes it, adds a `roae` module to each attention layer, and lets
    the norms of the adapted decoder layers train. The model computes what it computed before until it is trained.

    Args:
        model (nn.Module): a model of transformers with rotary attention, of any floating dtype, on any device or
            several, or on the meta device.
        config (RosaConfig, optional): None takes the paper's defaults.

    Returns:
        The same model.

    Raises:
        TypeError: `config` is no RosaConfig.
        ValueError: the model is patched already, or the configuration does not fit it.
        UnsupportedModelError: the model cannot be adapted.
        Nothing is changed after an error.
    """
    config = RosaConfig() if config is None else config
    if not isinstance(config, RosaConfig):
        raise TypeError(f"config must be a rosa.RosaConfig, got {type(config).__name__}")
    if is_patched(model):
        raise ValueError(f"this {type(model).__name__} is patched already; call rosa.unpatch(model) first")

    owner = getattr(model, "_orig_mod", model)  # the model inside torch.compile's wrapper
    sites = _adapted_sites(owner, config)
    adapters = _make_adapters(sites, config)  # all that can fail lies before the first change
    norms = {name: norm for site in sites for name, norm in site.layer.norms.items()} if config.train_norms else {}

    record = Patch(
        config=config,
        attentions=[site.name for site in sites],
        norms={f"{name}.weight": norm.weight.detach().clone() for name, norm in norms.items()},
        requires_grad={name: p.requires_grad for name, p in owner.named_parameters()},
        hooks=[],
    )
    owner.requires_grad_(False)
    for norm in norms.values():
        record.hooks += _widen(norm, config.torch_dtype)
        norm.weight.requires_grad_(True)
    for site, adapter in zip(sites, adapters, strict=True):
        record.hooks += attach(site.attention, ADAPTER_NAME, adapter)
    owner._rosa = record
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Takes RoSA off a model in place: its modules, its hooks, its norm weights and requires_grad flags are as before.

    Norms of a model that was patched on the meta device keep their values: there were none before.

    Raises:
        ValueError: the model is not patched, or parameters were renamed since. Nothing is changed then.
    """
    owner, record = _patched(model)
    parameters = dict(owner.named_parameters())
    renamed = [name for name in record.requires_grad if name not in parameters]
    if renamed:
        raise ValueError(
            f"{len(renamed)} parameters of this {type(owner).__name__} have other names since it was patched, "
            f"{renamed[0]} among them: undo what renamed them first (a PEFT model's `unload`, for example)"
        )
    for hook in record.hooks:
        hook.remove()
    for name in record.attentions:
        delattr(owner.get_submodule(name), ADAPTER_NAME)
    for name, value in record.norms.items():
        parameter = parameters[name]
        parameter.data = parameter.data.to(value.dtype) if value.is_meta else value.to(parameter.device)
        parameter.grad = None
    for name, flag in record.requires_grad.items():
        parameters[name].requires_grad_(flag)
    del owner._rosa
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or a model that it wraps, carries RoSA."""
    return any("_rosa" in module.__dict__ for module in model.modules())


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What RoSA trains in a patched model, by full name within it: the RoAE weights and the trained norm weights.

    Raises:
        ValueError: the model is not patched.
    """
    owner, record = _patched(model)
    own = {
        f"{name}.{ADAPTER_NAME}.{weight}": parameter
        for name in record.attentions
        for weight, parameter in owner.get_submodule(f"{name}.{ADAPTER_NAME}").named_parameters()
    }
    return own | {name: owner.get_parameter(name) for name in record.norms}


def adapter_config(model: nn.Module) -> RosaConfig:
    """The configuration that the model was patched with.

    Raises:
        ValueError: the model is not patched.
    """
    return _patched(model)[1].config


def base_name(model: nn.Module) -> str | None:
    """The name or path that the patched model was loaded from, as far as it has one."""
    return getattr(getattr(_patched(model)[0], "config", None), "name_or_path", None) or None


def describe_base(model: nn.Module) -> dict[str, int | str | bool]:
    """The shape of the model that an adapter must fit: its type, layers, and its first attention's widths, heads and
    rotary layout.

    Raises:
        UnsupportedModelError: the model has no rotary attention that RoSA can adapt.
    """
    sites = rotary_sites(model)
    attention, shape = sites[0].attention, sites[0].shape
    return {
        "model_type": attention.config.model_type,
        "layers": len({site.layer.name for site in sites}),
        "hidden_size": shape.hidden_size,
        "heads": shape.heads,
        "key_heads": shape.key_heads,
        "head_dim": shape.head_dim,
        **shape.layout._asdict(),
    }


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to an optimizer: those that require gradients, and in a patched model all that RoSA
    trains, also those that layer selection has frozen for the moment."""
    adapter = {id(p) for p in adapter_parameters(model).values()} if is_patched(model) else set()
    return [p for p in model.parameters() if p.requires_grad or id(p) in adapter]


def count_parameters(model: nn.Module) -> tuple[int, int, float]:
    """Counts parameters as (trainable, total, percent), the base model's and RoSA's, tied weights once."""
    trainable = sum(p.numel() for p in trainable_parameters(model))
    total = sum(p.numel() for p in model.parameters())
    return trainable, total, 100 * trainable / total


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints what `count_parameters` counts."""
    trainable, total, percent = count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percent:.4f}")


def _patched(model: nn.Module) -> tuple[nn.Module, Patch]:
    """The patched model, which may stand inside wrappers such as DDP, and its record."""
    for module in model.modules():
        if "_rosa" in module.__dict__:
            return module, module._rosa
    raise ValueError(f"this {type(model).__name__} is not patched; call rosa.patch(model) first")


def _adapted_sites(model: nn.Module, config: RosaConfig) -> list[RotarySite]:
    sites = rotary_sites(model)
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


def _make_adapters(sites: list[RotarySite], config: RosaConfig) -> list[RoAE]:
    """The adapter of every site, not attached yet."""
    adapters = []
    for site in sites:
        device = next(site.attention.parameters()).device
        if device.type == "meta" and any(hasattr(module, "_hf_hook") for module in site.attention.modules()):
            raise UnsupportedModelError(
                f"{site.name} is offloaded to the CPU or to disk; RoSA trains models in device memory"
            )
        _, heads, key_heads, _, layout = site.shape
        adapter = RoAE(config, site.shape.hidden_size, heads, key_heads, layout, device)
        adapters.append(adapter.train(site.attention.training))
    return adapters


def _widen(norm: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Lets a 16-bit norm train in the adapter's dtype: in bfloat16 a step of 1e-3 on a weight of 1 rounds to none.

    The output keeps the input's dtype, so the model computes what it did.
    """
    wide = torch.promote_types(norm.weight.dtype, dtype)
    if wide == norm.weight.dtype or isinstance(norm, nn.LayerNorm):  # whose kernels want input and weight alike
        return []
    norm.weight.data = norm.weight.data.to(wide)
    return [norm.register_forward_hook(_keep_dtype)]


def _keep_dtype(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output.to(args[0].dtype)
