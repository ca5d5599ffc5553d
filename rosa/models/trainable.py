"""Where gradients would be lost without a word: quantized layers that have no backward, offloaded weights, and tensors
of PyTorch's inference mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rosa.errors import UnsupportedModelError


def refuse_inference_mode(model: nn.Module) -> None:
    """Raises where autograd could never work on what is made now, or on what the model has.

    Raises:
        ValueError: this is inside `torch.inference_mode()`.
        UnsupportedModelError: the model was made there.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("what is made inside torch.inference_mode() can never train: add the adapter outside of it")
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise UnsupportedModelError(
            f"{name} of this {type(model).__name__} was made inside torch.inference_mode(), and nothing that passes "
            "through it can train: load the model outside of it"
        )


def refuse_layers_without_backward(model: nn.Module) -> None:
    """Runs one quantized linear layer of every kind in the model, forward and backward.

    Raises:
        UnsupportedModelError: one passes no gradient on to its input, so that nothing below it would train.
    """
    dtype = next((p.dtype for p in model.parameters() if not is_quantized(p)), torch.float32)
    seen = set()
    for name, module in model.named_modules():
        quantized = [t for t in (*module.parameters(False), *module.buffers(False)) if is_quantized(t)]
        kind = (type(module), *((type(t), t.dtype) for t in quantized))
        if not quantized or not hasattr(module, "in_features") or kind in seen or any(t.is_meta for t in quantized):
            continue
        seen.add(kind)
        failure = _failure_of_backward(module, dtype, quantized[0].device)
        if failure:
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} is a quantized {type(module).__name__} "
                f"({type(quantized[0]).__name__}, {quantized[0].dtype}) that gives its input no gradient, so that RoSA "
                f"could not train below it ({failure}). Quantize the model otherwise, for example with bitsandbytes; "
                "where it is 4-bit and on a CPU, load it anew and patch it before it generates"
            )


def is_quantized(tensor: Tensor) -> bool:
    """Whether it holds integers or 8-bit floats, or is a tensor of a quantization library's own kind."""
    own_kind = not type(tensor).__module__.startswith("torch.")
    return own_kind or tensor.dtype.itemsize == 1 or not tensor.is_floating_point()


def _failure_of_backward(module: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the layer gives its input no gradient, in a line, or None where it does."""
    with torch.enable_grad():
        x = torch.ones(1, 8, module.in_features, dtype=dtype, device=device, requires_grad=True)
        try:
            torch.autograd.grad(module(x).float().sum(), x)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


@dataclass
class _Unpacked:
    """bitsandbytes' 4-bit layers on a CPU that were kept from packing their weights."""

    layers: list[nn.Module]

    def remove(self) -> None:
        for layer in self.layers:
            layer.support_avx512bf16_for_cpu = True


def keep_unpacked(model: nn.Module) -> _Unpacked:
    """Keeps bitsandbytes' 4-bit layers on a CPU trainable: at their first call without gradients, as in evaluation,
    they would pack their weights for a faster kernel of CPUs with AVX512-BF16, one that has no backward.

    Returns:
        A handle whose `remove` lets them.
    """
    layers = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return _Unpacked(layers)


def refuse_offloaded(modules: dict[str, nn.Module]) -> None:
    """Raises UnsupportedModelError where accelerate offloads one of the modules to the CPU or to disk: its gradients
    would go to a copy that is thrown away."""
    for name, module in modules.items():
        if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters()):
            raise UnsupportedModelError(
                f"{name} is offloaded to the CPU or to disk: it takes part in a forward as a copy, and would never "
                "train. Offloaded models generate; train with a device_map of devices alone"
            )
