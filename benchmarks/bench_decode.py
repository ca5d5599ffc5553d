"""Decoding one token at a time with a key-value cache, behind a prompt: the base alone and with unmerged adapters.

`--preset` chooses the model as for the training step. Every method starts from the same weights and continues the same
prompts, greedily. The time of a token is the mean, on the host's clock, from one finished token to the next; the prompt
is not in it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import rosa
from benchmarks.cases import DEVICE, DTYPE
from benchmarks.methods import LINEARS
from benchmarks.presets import NAMES, PRESETS, default_preset

BATCHES = (1, 8)
PROMPT, TOKENS = (512, 64) if DEVICE == "cuda" else (16, 4)
WARMUP = 3


def lora(model: PreTrainedModel) -> None:
    """LoRA of peft, unmerged, in the base's dtype."""
    get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS), autocast_adapter_dtype=False)


ADAPTERS: dict[str, Callable[[PreTrainedModel], object]] = {
    "base": lambda model: None,
    "RoSA": rosa.patch,
    "LoRA r=16": lora,
    "RoAd": lambda model: rosa.patch(model, rosa.RoadConfig(variant=1)),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", ADAPTERS)
@torch.no_grad()
def bench_decode(benchmark, record, request, batch, method):
    preset = request.config.getoption("--preset") or default_preset(max(BATCHES) * PROMPT)
    gc.collect()  # the model of the method before
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(PRESETS[preset], dtype=DTYPE)
    ADAPTERS[method](model)
    model.eval()
    prompts = torch.randint(model.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    out = model(input_ids=prompts.to(DEVICE), use_cache=True, logits_to_keep=1)

    def decode() -> None:
        nonlocal out
        token = out.logits.argmax(dim=-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"decode {NAMES[preset]} {batch} {PROMPT}"
    benchmark.pedantic(decode, rounds=TOKENS, warmup_rounds=WARMUP)
    assert out.past_key_values.get_seq_length() > PROMPT
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.mean
    record(
        group="decode", provider=method, mode="decode", shape=NAMES[preset], batch=batch, seq=PROMPT,
        milliseconds=seconds * 1e3, tokens_per_second=batch / seconds,
    )  # fmt: skip
