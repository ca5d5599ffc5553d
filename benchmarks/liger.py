"""Liger's RMSNorm and SwiGLU in a Qwen2 model, and its launches as operators that can be counted on any machine.

Its RoPE and its losses stay out: the one is RoSA's own launch, the others would compare another loss.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen2 import modeling_qwen2

INSTALLED = importlib.util.find_spec("liger_kernel") is not None
LIGER = ", Liger's norms and SwiGLU"  # at the end of a method's or a layer's name
OPS = ("liger_kernel.ops.rms_norm", "liger_kernel.ops.swiglu")


def unavailable() -> str | None:
    """Why Liger's kernels are not timed here, or None if they are."""
    if not torch.cuda.is_available():
        return "liger is for GPUs"
    return None if INSTALLED else "liger-kernel is not installed"


def norms_and_swiglu(model: PreTrainedModel) -> None:
    """Gives the norms and the MLPs of a Qwen2 model Liger's forward; their parameters stay."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    # Liger also puts its classes in place of transformers', for models that are made later: those are to stay plain.
    with mock.patch.multiple(modeling_qwen2, Qwen2RMSNorm=mock.DEFAULT, Qwen2MLP=mock.DEFAULT):
        apply_liger_kernel_to_qwen2(
            rope=False, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False, model=model
        )  # fmt: skip


@torch.library.custom_op("benchmarks::liger_launch", mutates_args=())
def launch(tensor: Tensor) -> None:
    """Stands for one launch of a kernel of Liger; computes nothing."""


@launch.register_fake
def _(tensor: Tensor) -> None:
    pass


class _Kernel:
    """In place of a Triton kernel: `kernel[grid](...)` is one operator, and its outputs stay as they were allocated."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda tensor, *args, **options: launch(tensor)


@contextlib.contextmanager
def counted_launches() -> Iterator[None]:
    """Inside, Liger's norms and SwiGLU allocate and save what they do, but launch only `benchmarks::liger_launch`."""
    with contextlib.ExitStack() as stack:
        for module in map(importlib.import_module, OPS if INSTALLED else ()):
            for name in [name for name in vars(module) if name.endswith(("_kernel", "_kernel_tiled"))]:
                stack.enter_context(mock.patch.object(module, name, _Kernel()))
        yield
