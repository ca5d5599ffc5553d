"""What a training step needs of a GPU's memory: by formulas, and by counting what the layers save for backward."""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from rosa.models.decoder import decoder_layers, text_decoder

GIB = 2**30
CONTEXT = GIB  # bytes, about what CUDA itself takes
STATE = 4  # of what trains: the weight, its gradient and AdamW's two moments
LOGIT = 14  # bytes a token and word: bfloat16 logits; in float32 their copy, their log-softmax and its gradient
CAPPED_LOGIT = 2  # and the tanh that Gemma-2 keeps
# Bytes of a weight in `--load_in`: LLM.int8; NF4 with a scale of 8 bits for 64 weights, and one of 32 for 256 scales.
LOADED = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}

_NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)

Out = TypeVar("Out")


class Memory(NamedTuple):
    """Bytes of a training step.

    Attributes:
        base (int): frozen weights.
        trained (int): weights that train, their gradients and AdamW's two moments.
        layers (float): what the decoder saves for backward, all of its layers training.
        logits (float): the logits, and what the loss makes of them.
        context (int): what CUDA itself takes, about.
    """

    base: float
    trained: int
    layers: float
    logits: float
    context: int = CONTEXT


def state_bytes(frozen: float, trained: float) -> float:
    """Bytes of weights that are frozen and of weights that train, with the gradients and AdamW's moments of these."""
    return frozen + STATE * trained


def quantized(frozen: float, linears: int, load_in: str, *, width: int = 2) -> float:
    """Bytes of a base's frozen weights when those of its decoder's linear layers are quantized.

    Args:
        frozen (float): bytes as they are saved.
        linears (int): the number of these weights.
        load_in (str): "8bit" or "4bit".
        width (int): bytes of one as it is saved.
    """
    return frozen - linears * (width - LOADED[load_in])


def kept_by_layers(config: PreTrainedConfig, layer: float, tokens: int, *, checkpoints: bool) -> float:
    """Bytes that all decoder layers keep for backward.

    Args:
        config (PreTrainedConfig): of the text model.
        layer (float): bytes that one layer saves.
        tokens (int): of the batch, padding included.
        checkpoints (bool): gradient checkpointing keeps the layers' inputs in 16 bits, and what the one layer saves
            that is computed again.
    """
    if checkpoints:
        return config.num_hidden_layers * tokens * config.hidden_size * 2 + layer
    return config.num_hidden_layers * layer


def logits(config: PreTrainedConfig) -> int:
    """Bytes of the logits of a token, and of what the loss makes of them."""
    capped = CAPPED_LOGIT if getattr(config, "final_logit_softcapping", None) else 0
    return (LOGIT + capped) * config.vocab_size


def saved_bytes(module: nn.Module, run: Callable[[], Out]) -> tuple[Out, int]:
    """Runs a module: what comes out, and the bytes that the graph of it saves, every storage once, parameters aside.

    Args:
        module (nn.Module): whose parameters do not count.
        run (callable): one pass through it.
    """
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    held: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(t: Tensor) -> _Saved:
        held.add(saved := _Saved(t))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = run()
    # What belongs to a part of the graph that was dropped again is no longer held.
    storages = {s._cdata: s.nbytes() for s in (saved.tensor.untyped_storage() for saved in held)}
    return out, sum(n for storage, n in storages.items() if storage not in parameters)


def step_memory(model: nn.Module, rows: int, length: int, labels: int, *, checkpoints: bool, bf16: bool) -> Memory:
    """What a step of training takes, on one GPU that holds it all.

    The decoder runs on tensors that have shapes and no values, as on a padded batch, with the fused kernels if they are
    installed. Work buffers, fragmentation and evaluation are not counted.

    Args:
        model (nn.Module): on the meta device, with what trains attached; of no use afterwards.
        rows, length (int): of the batch; length in tokens.
        labels (int): positions whose logits are computed.
        checkpoints (bool): gradient checkpointing.
        bf16 (bool): the layers run under autocast to bfloat16.

    Raises:
        ValueError: the model or the method asks for values, as BOFT and some mixtures of experts do.
    """
    config = model.config.get_text_config()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    base = sum(p.nbytes for p in model.parameters()) - trained
    decoder = text_decoder(model)
    with _as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, bf16):
        model.to_empty(device="cpu").train()
        ids = torch.ones(rows, length, dtype=torch.long)
        try:
            _, saved = saved_bytes(model, lambda: decoder(input_ids=ids, use_cache=False))
        except _NEEDS_VALUES as error:
            raise ValueError(f"what the layers keep cannot be counted without values ({error})") from error
    layers = kept_by_layers(config, saved / len(decoder_layers(model)), rows * length, checkpoints=checkpoints)
    return Memory(base, STATE * trained, layers, labels * logits(config))


class _Saved:
    """A tensor saved for backward, alive as long as the graph holds it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Has the ops take the kernels of a GPU for tensors without values, of which only the shapes are asked."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    wanted = {"TRITON_INTERPRET": "1", "ROSA_BACKEND": "triton"}
    before: dict[str, Any] = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
