"""Quantizing a base as it is loaded: its linear layers in 4 or 8 bits, by bitsandbytes, or by torchao where that is
missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

LOAD_IN = ("4bit", "8bit")
_GROUP = 32  # weights of torchao's int4 that share a scale


def quantization(load_in: str) -> QuantizationConfigMixin:
    """What `from_pretrained` takes as `quantization_config`.

    From bitsandbytes, 4 bits are NF4 with quantized scales and products in bfloat16 (QLoRA, Dettmers et al. 2023), and
    8 bits LLM.int8 (Dettmers et al. 2022). From torchao they are weights in int4 and int8, multiplied in the dtype of
    the model; int4 in the form that trains on any device, which keeps a byte a weight.

    Args:
        load_in (str): one of LOAD_IN.

    Raises:
        ValueError: it is none of them.
        ImportError: neither package can be imported.
    """
    if load_in not in LOAD_IN:
        raise ValueError(f"load_in must be one of {', '.join(LOAD_IN)}, got {load_in!r}")
    if _imports("bitsandbytes"):
        return _of_bitsandbytes(load_in)
    if _imports("torchao"):
        return _of_torchao(load_in)
    raise ImportError(
        f"load_in {load_in} needs a package that quantizes, and neither bitsandbytes nor torchao can be imported: "
        "pip install '.[quant]' in RoSA's folder"
    )


def _imports(package: str) -> bool:
    try:
        __import__(package)
    except (ImportError, OSError, RuntimeError, AttributeError):  # also one that was built for another PyTorch
        return False
    return True


def _of_bitsandbytes(load_in: str) -> QuantizationConfigMixin:
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _of_torchao(load_in: str) -> QuantizationConfigMixin:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if load_in == "8bit":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(_GROUP)))
