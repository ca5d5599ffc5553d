"""`patch` and `unpatch`: an adapter on a model and off it again, in place."""

from __future__ import annotations

from torch import nn

from rosa.adapters.config import AdapterConfig
from rosa.adapters.merging import unmerge
from rosa.adapters.plan import make_adapter, plan_adapter, unwrapped
from rosa.adapters.record import Adapter, Patch, is_patched, patched
from rosa.adapters.save_pretrained import save_pretrained_saves_adapters
from rosa.models.sharding import check_not_sharded
from rosa.models.trainable import keep_unpacked


def patch(model: nn.Module, config: AdapterConfig | None = None, adapter_name: str = "default") -> nn.Module:
    """Adds an adapter to a Hugging Face model in place and freezes everything else. The model computes what it computed
    before until it is trained. PEFT's adapters in it go on to train.

    RoSA adds a `roae` module to each attention layer, and lets the norms of the adapted decoder layers train. RoAd adds
    a `road` module to each linear layer, whose output goes through it.

    A model that is patched already gets a second adapter, of either kind, under another name, which is the active one
    from then on: see `set_adapter`.

    Args:
        model (nn.Module): a model of transformers, for RoSA with rotary attention, of any floating dtype, on any device
            or several, or on the meta device; wrapped or not.
        config (RosaConfig or RoadConfig, optional): None takes RoSA with the paper's defaults.
        adapter_name (str): of letters, digits, "_" and "-".

    Returns:
        The same model.

    Raises:
        TypeError: `config` is neither.
        ValueError: the model has an adapter of this name, is part of a model that is patched, or the name or the
            configuration does not fit; what its adapters stand in was replaced or copied; or this is inside
            `torch.inference_mode()`.
        UnsupportedModelError: the model cannot be adapted.
        Nothing is changed after an error.
    """
    add_adapter(model, adapter_name, make_adapter(plan_adapter(model, config, adapter_name)))
    return model


def add_adapter(model: nn.Module, adapter_name: str, adapter: Adapter) -> None:
    """Adds what `make_adapter` made and switches it in; the first adapter freezes the model."""
    if not is_patched(model):
        owner = unwrapped(model)
        # PEFT has frozen a base that carries its adapters, and may rename parameters until `unpatch`.
        frozen = {} if hasattr(owner, "peft_config") else dict(owner.named_parameters())
        flags = {name: p.requires_grad for name, p in frozen.items()}
        owner.__dict__["_rosa"] = Patch(
            type(owner).__name__, flags, save_pretrained_saves_adapters, hooks=[keep_unpacked(owner)]
        )
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        save_pretrained_saves_adapters()
    patched(model)[1].add(adapter_name, adapter)


def unpatch(model: nn.Module) -> nn.Module:
    """Takes all adapters off a model in place: its modules, its hooks, its norm weights and requires_grad flags are as
    before. One that is merged goes too: what `merge` made of the base is written by `save_pretrained` before.

    Norms of a model that was patched on the meta device keep their values: there were none before.

    Raises:
        ValueError: the model is not patched, is sharded, is inside `disabled`, its trained norms are offloaded,
            parameters were renamed since, or PEFT trains a copy of what adapters stand in or train.
            Nothing is changed then.
    """
    owner, record = patched(model)
    record.check_in_place(model)
    parameters = dict(owner.named_parameters())
    renamed = [name for name in record.requires_grad if name not in parameters]
    if renamed:
        raise ValueError(
            f"{len(renamed)} parameters of this {type(owner).__name__} have other names since it was patched, "
            f"{renamed[0]} among them: undo what renamed them first (a PEFT model's `unload`, for example)"
        )
    check_not_sharded(model)
    if record.kept:
        unmerge(model)
    record.check_enabled()
    record.active_adapter.check_norms_in_memory()
    record.remove()
    for name, flag in record.requires_grad.items():
        parameters[name].requires_grad_(flag)
    del owner._rosa
    return model
