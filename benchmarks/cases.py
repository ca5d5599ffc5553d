"""Where and at which sizes the benchmarks run.

On a GPU: bfloat16, the attention shapes of the paper's three models, the paper's short batches, a usual batch and a
long sequence. Without one: float32 and one small shape on the reference backend, so that the benchmarks run anywhere;
those times say nothing about a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rosa_kernels.offline import SHAPES, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOKENS = ((2, 230), (2, 2048), (1, 16384)) if DEVICE == "cuda" else ((2, 64),)
SMALL = Shape("small", heads=4, key_heads=2, head_dim=64, low_pairs=8)
HIDDEN = {"Qwen2.5-7B": 3584, "Llama-3.1-8B": 4096, "Gemma-2-9B": 3584, "small": 256}  # d of each shape


class Case(NamedTuple):
    """An attention shape and a batch of `batch` sequences of `seq` tokens."""

    shape: Shape
    batch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.shape.name}-{self.batch}x{self.seq}"

    @property
    def labels(self) -> dict[str, str | int]:
        """The case as labels of a row."""
        return {"shape": self.shape.name, "batch": self.batch, "seq": self.seq}


CASES = [Case(shape, *tokens) for shape in (SHAPES if DEVICE == "cuda" else (SMALL,)) for tokens in TOKENS]
# In float64 the long sequence would take gigabytes.
ACCURACY_CASES = [case for case in CASES if case.batch * case.seq <= 4096]
