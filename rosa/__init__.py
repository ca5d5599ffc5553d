"""RoSA: RoPE-aware Selective Adaptation of language models (AAAI 2026, arXiv 2511.21733)."""

from rosa.config import RosaConfig
from rosa.errors import AdapterError, UnsupportedModelError
from rosa.patching import (
    count_parameters,
    is_patched,
    patch,
    print_trainable_parameters,
    trainable_parameters,
    unpatch,
)

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "RosaConfig",
    "UnsupportedModelError",
    "count_parameters",
    "is_patched",
    "patch",
    "print_trainable_parameters",
    "trainable_parameters",
    "unpatch",
]
