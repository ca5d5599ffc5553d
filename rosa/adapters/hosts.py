"""The modules of a model that adapters stand in or train: marked, so that a part of the model knows whose it is, and so
that it shows where another library has replaced or copied one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

PART_OF = "_rosa_part_of"  # on every such module, the name of the patched model's class


def refuse_copied(model: nn.Module, known: Iterable[nn.Module]) -> None:
    """Raises ValueError where a marked module is none of the known ones: a copy, which PEFT trains of what it saves."""
    ids = {id(module) for module in known}
    modules = model.named_modules()
    copied = next((name for name, module in modules if PART_OF in module.__dict__ and id(module) not in ids), None)
    if copied is not None:
        raise ValueError(
            f"{copied} of this {type(model).__name__} is a copy of what an adapter of rosa.patch stands in or trains, "
            "and has taken its place: take the copy out first (a PEFT model's `delete_adapter` does), and leave such "
            "modules out of PEFT's modules_to_save and LN tuning"
        )


def refuse_replaced(model: nn.Module, adapter_name: str, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where the model has lost one of the modules that an adapter stands in or trains."""
    ids = {id(module) for module in model.modules()}
    lost = next((name for name, module in modules.items() if id(module) not in ids), None)
    if lost is not None:
        raise ValueError(
            f"the adapter {adapter_name!r} does nothing at {lost} of this {type(model).__name__}, which has been "
            "replaced since (by merge_and_unload of a PEFT model that it was put on, or dequantize(), for example): "
            "save it with rosa.save_adapter, call rosa.unpatch(model), and load it again"
        )
