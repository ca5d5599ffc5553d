"""Packaging of RoSA: the packages `rosa` and `rosa_kernels` and the console script `rosa`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="rosa-peft",
    version="0.1.0",
    description="RoPE-aware Selective Adaptation of language models, with fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["rosa*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "filelock>=3.20",
    ],
    extras_require={
        "train": ["accelerate>=1.10", "datasets>=4.0", "peft>=0.18", "matplotlib>=3.8", "scipy>=1.11"],
        "examples": ["trl>=1.16"],
        "deepspeed": ["deepspeed>=0.19.8"],
        "bench": ["pytest-benchmark>=5", "liger-kernel>=0.7", "matplotlib>=3.8"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff>=0.12",
            "bitsandbytes>=0.50",
            "torchao>=0.18",
            "tensorboard>=2.19",
        ],
    },
    entry_points={"console_scripts": ["rosa = rosa.cli:main"]},
)
