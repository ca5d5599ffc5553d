"""`rosa info`: versions, GPUs and kernel backends."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import rosa
import rosa_kernels
from rosa.adapters.card import PAPERS
from rosa.commands import parser

PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "torchao", "deepspeed",
    "liger-kernel",
)  # fmt: skip


def run(argv: list[str]) -> None:
    """Run `rosa info`."""
    parser("info", "Show versions, GPUs and kernel backends.").parse_args(argv)
    print(f"rosa          {rosa.__version__}")
    print(f"Python        {platform.python_version()}")
    for package in PACKAGES:
        try:
            print(f"{package:13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:13} not installed")
    print(f"adapters      {', '.join(paper.title for paper in PAPERS.values())}")
    for gpu in _gpus():
        print(f"GPU           {gpu}")
    print(f"backends      {', '.join(rosa_kernels.available_backends())}")
    for variable in ("ROSA_BACKEND", "TRITON_INTERPRET"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")


def _gpus() -> list[str]:
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{c.name}, {c.total_memory / 2**30:.0f} GiB, sm_{c.major}{c.minor}" for c in cards] or ["no GPU"]
