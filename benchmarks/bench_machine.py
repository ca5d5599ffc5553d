"""What the machine can do, measured in the same run: a copy in device memory and a matrix product.

The other groups' figures are set against these: bytes moved against the copy, operations against the product.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DEVICE, DTYPE

COPY_BYTES = 2**31 if DEVICE == "cuda" else 2**22  # read and written; far larger than any cache of a GPU
SIDE = 8192 if DEVICE == "cuda" else 256


def bench_copy(measure):
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    labels = dict(mode="forward", shape=f"{COPY_BYTES} bytes", batch=1, seq=1)
    measure(lambda: target.copy_(source), group="copy", provider="torch", bytes=COPY_BYTES, **labels)


def bench_matmul(measure):
    a, b = torch.randn(2, SIDE, SIDE, dtype=DTYPE, device=DEVICE)
    labels = dict(mode="forward", shape=f"{SIDE}^3", batch=1, seq=1)
    measure(lambda: a @ b, group="matmul", provider="torch", flops=2 * SIDE**3, **labels)
