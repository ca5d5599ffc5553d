"""Rotary adapters of language models: RoSA, RoPE-aware Selective Adaptation (AAAI 2026, arXiv 2511.21733), and RoAd, 2D
rotary adaptation (NeurIPS 2024, arXiv 2409.00119)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosa.adapters.by_row import adapters_by_row
    from rosa.adapters.config import RoadConfig, RosaConfig
    from rosa.adapters.disk import load_adapter
    from rosa.adapters.hub import push_to_hub
    from rosa.adapters.merging import merge, unmerge
    from rosa.adapters.parameters import count_parameters, print_trainable_parameters, trainable_parameters
    from rosa.adapters.patching import patch, unpatch
    from rosa.adapters.record import is_patched
    from rosa.adapters.saving import save_adapter
    from rosa.adapters.switching import active_adapter, adapter_names, delete_adapter, disabled, set_adapter
    from rosa.composition import rotations
    from rosa.composition.compose import (
        compose,
        composition_parameters,
        decompose,
        is_composed,
        tasks_by_row,
        use_tasks,
    )
    from rosa.composition.disk import load_composition, save_composition
    from rosa.composition.intervention import dii
    from rosa.errors import AdapterError, UnsupportedModelError
    from rosa.selection.algorithm import Selection
    from rosa.selection.optimizer import DynamicLayerSelection
    from rosa.selection.zero import layer_groups
    from rosa.training.loading import load
    from rosa.training.trainer import RosaTrainer

__version__ = "0.2.0"
__all__ = [
    "AdapterError",
    "DynamicLayerSelection",
    "RoadConfig",
    "RosaConfig",
    "RosaTrainer",
    "Selection",
    "UnsupportedModelError",
    "active_adapter",
    "adapter_names",
    "adapters_by_row",
    "compose",
    "composition_parameters",
    "count_parameters",
    "decompose",
    "delete_adapter",
    "dii",
    "disabled",
    "is_composed",
    "is_patched",
    "layer_groups",
    "load",
    "load_adapter",
    "load_composition",
    "merge",
    "patch",
    "print_trainable_parameters",
    "push_to_hub",
    "rotations",
    "save_adapter",
    "save_composition",
    "set_adapter",
    "tasks_by_row",
    "trainable_parameters",
    "unmerge",
    "unpatch",
    "use_tasks",
]

# Where each name of __all__ is at home: imported when it is first asked for. torch alone takes more than a second,
# transformers' Trainer, which needs accelerate too, several; `rosa --help` needs neither.
_HOMES = {
    "AdapterError": "rosa.errors",
    "DynamicLayerSelection": "rosa.selection.optimizer",
    "RoadConfig": "rosa.adapters.config",
    "RosaConfig": "rosa.adapters.config",
    "RosaTrainer": "rosa.training.trainer",
    "Selection": "rosa.selection.algorithm",
    "UnsupportedModelError": "rosa.errors",
    "active_adapter": "rosa.adapters.switching",
    "adapter_names": "rosa.adapters.switching",
    "adapters_by_row": "rosa.adapters.by_row",
    "compose": "rosa.composition.compose",
    "composition_parameters": "rosa.composition.compose",
    "count_parameters": "rosa.adapters.parameters",
    "decompose": "rosa.composition.compose",
    "delete_adapter": "rosa.adapters.switching",
    "dii": "rosa.composition.intervention",
    "disabled": "rosa.adapters.switching",
    "is_composed": "rosa.composition.compose",
    "is_patched": "rosa.adapters.record",
    "layer_groups": "rosa.selection.zero",
    "load": "rosa.training.loading",
    "load_adapter": "rosa.adapters.disk",
    "load_composition": "rosa.composition.disk",
    "merge": "rosa.adapters.merging",
    "patch": "rosa.adapters.patching",
    "print_trainable_parameters": "rosa.adapters.parameters",
    "push_to_hub": "rosa.adapters.hub",
    "rotations": "rosa.composition",
    "save_adapter": "rosa.adapters.saving",
    "save_composition": "rosa.composition.disk",
    "set_adapter": "rosa.adapters.switching",
    "tasks_by_row": "rosa.composition.compose",
    "trainable_parameters": "rosa.adapters.parameters",
    "unmerge": "rosa.adapters.merging",
    "unpatch": "rosa.adapters.patching",
    "use_tasks": "rosa.composition.compose",
}

if not TYPE_CHECKING:  # a checker knows the names above, and no others

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # `from home import name`, which finds a function as well as a module.
        globals()[name] = value = getattr(__import__(_HOMES[name], fromlist=[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
