"""Rotary adapters of language models: RoSA, RoPE-aware Selective Adaptation (AAAI 2026, arXiv 2511.21733), and RoAd, 2D
rotary adaptation (NeurIPS 2024, arXiv 2409.00119)."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from rosa.training.loading import load
    from rosa.training.trainer import RosaTrainer

__version__ = "0.1.0"
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


def __getattr__(name: str):
    # transformers' Trainer needs accelerate and takes seconds to import; those who bring their own loop need neither.
    if name == "RosaTrainer":
        from rosa.training.trainer import RosaTrainer

        return RosaTrainer
    if name == "load":
        from rosa.training.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
