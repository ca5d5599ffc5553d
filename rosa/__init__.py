"""RoSA: RoPE-aware Selective Adaptation of language models (AAAI 2026, arXiv 2511.21733)."""

from typing import TYPE_CHECKING

from rosa.adapter import load_adapter, save_adapter
from rosa.config import RosaConfig
from rosa.errors import AdapterError, UnsupportedModelError
from rosa.hub import push_to_hub
from rosa.patching import (
    count_parameters,
    is_patched,
    patch,
    print_trainable_parameters,
    trainable_parameters,
    unpatch,
)
from rosa.selection import DynamicLayerSelection, Selection
from rosa.switching import active_adapter, adapter_names, delete_adapter, disabled, set_adapter
from rosa.zero import layer_groups

if TYPE_CHECKING:
    from rosa.trainer import RosaTrainer

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "DynamicLayerSelection",
    "RosaConfig",
    "RosaTrainer",
    "Selection",
    "UnsupportedModelError",
    "active_adapter",
    "adapter_names",
    "count_parameters",
    "delete_adapter",
    "disabled",
    "is_patched",
    "layer_groups",
    "load_adapter",
    "patch",
    "print_trainable_parameters",
    "push_to_hub",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unpatch",
]


def __getattr__(name: str):
    # transformers' Trainer needs accelerate and takes seconds to import; those who bring their own loop need neither.
    if name == "RosaTrainer":
        from rosa.trainer import RosaTrainer

        return RosaTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
