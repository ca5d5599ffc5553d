"""The fine-tuning methods whose training steps are measured: what each makes trainable, and its optimizer.

The peft adapters are in the base's dtype, the faster of the two that peft offers; RoSA's are in float32, its default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import LNTuningConfig, LoraConfig, PeftConfig, RoadConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import rosa
from benchmarks.liger import LIGER, norms_and_swiglu
from benchmarks.static import rosa_naive

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]
INTERVAL = 40  # steps between the selections of DLS, the paper's

Step = Callable[[], None]


class Training(NamedTuple):
    """A step of training, how many steps make a whole round of it, and the number of parameters that it trains."""

    step: Step
    interval: int
    trainable_parameters: int


Method = Callable[[PreTrainedModel, Tensor], Training]


def frozen_floor(model: PreTrainedModel, tokens: Tensor) -> Training:
    """Nothing is trained: forward with the loss, and backward to the inputs only."""
    embeddings = model.requires_grad_(False).get_input_embeddings()(tokens).requires_grad_()

    def step() -> None:
        embeddings.grad = None
        model(inputs_embeds=embeddings, labels=tokens).loss.backward()

    return Training(step, 1, 0)


def rosa_mask(model: PreTrainedModel, tokens: Tensor) -> Training:
    """RoSA; DLS computes every gradient and drops the unwanted ones, as in the paper."""
    return _selective(rosa.patch(model), tokens, "mask")


def rosa_skip(model: PreTrainedModel, tokens: Tensor) -> Training:
    """RoSA; DLS freezes the layers that it has not selected."""
    return _selective(rosa.patch(model), tokens, "skip")


def rosa_eager(model: PreTrainedModel, tokens: Tensor) -> Training:
    """RoSA as one would write it in PyTorch, in the base's dtype, with DLS as in the paper."""
    rosa_naive(model.model)
    return _selective(model, tokens, "mask")


def lora(model: PreTrainedModel, tokens: Tensor) -> Training:
    """LoRA of peft, r=16 on all linear layers."""
    return _peft(model, tokens, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))


def dora(model: PreTrainedModel, tokens: Tensor) -> Training:
    """DoRA of peft, r=16 on all linear layers."""
    return _peft(model, tokens, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, use_dora=True))


def road(model: PreTrainedModel, tokens: Tensor) -> Training:
    """RoAd_1 of this package, on all linear layers."""
    parameters = rosa.trainable_parameters(rosa.patch(model, rosa.RoadConfig(variant=1)))
    return Training(_step(model, tokens, torch.optim.AdamW(parameters, lr=1e-4)), 1, _count(parameters))


def road_of_peft(model: PreTrainedModel, tokens: Tensor) -> Training:
    """RoAd_1 of peft, on all linear layers."""
    return _peft(model, tokens, RoadConfig(target_modules=LINEARS))


def ln_tuning(model: PreTrainedModel, tokens: Tensor) -> Training:
    """LN tuning of peft: the norms of the decoder layers."""
    return _peft(model, tokens, LNTuningConfig(target_modules=NORMS))


def with_liger(method: Method) -> Method:
    """The same with Liger's RMSNorm and SwiGLU; the loss is transformers' own, as for the other methods."""

    def training(model: PreTrainedModel, tokens: Tensor) -> Training:
        norms_and_swiglu(model)
        return method(model, tokens)

    return training


# By weight in the comparison, so that a run that is cut short has what matters most.
METHODS: dict[str, Method] = {
    "frozen floor": frozen_floor,
    "RoSA skip": rosa_skip,
    "LoRA r=16": lora,
    f"frozen floor{LIGER}": with_liger(frozen_floor),
    f"RoSA skip{LIGER}": with_liger(rosa_skip),
    f"LoRA r=16{LIGER}": with_liger(lora),
    "RoSA mask": rosa_mask,
    "RoSA eager": rosa_eager,
    "LN tuning": ln_tuning,
    "RoAd": road,
    "RoAd (peft)": road_of_peft,
    "DoRA r=16": dora,
}


def _peft(model: PreTrainedModel, tokens: Tensor, config: PeftConfig) -> Training:
    # transformers' own object is called, not peft's wrapper, as for the other methods.
    get_peft_model(model, config, autocast_adapter_dtype=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Training(_step(model, tokens, torch.optim.AdamW(parameters, lr=1e-4)), 1, _count(parameters))


def _selective(model: PreTrainedModel, tokens: Tensor, mode: str) -> Training:
    """Training under DLS with half of the layers; the first step is a selection step."""
    parameters = rosa.trainable_parameters(model)
    optimizer = rosa.DynamicLayerSelection(
        torch.optim.AdamW(parameters, lr=1e-4), model, k_ratio=0.5, interval=INTERVAL, mode=mode
    )
    state = optimizer.state_dict()
    state["layer_selection"]["step"] = INTERVAL - 1  # else the first interval would be spent waiting for a selection
    optimizer.load_state_dict(state)
    return Training(_step(model, tokens, optimizer), INTERVAL, _count(parameters))


def _step(model: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
