"""Eight requests with eight adapters in one batch: tokens a second of `generate`, greedy, prompts and answers of fixed
length, prefill included.

`--preset` chooses the model as for the training step. Every method starts from the same weights and answers the same
prompts. The time is that of one whole call after a short one, on the host's clock.
"""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.cases import DEVICE, DTYPE
from benchmarks.mixed_batch import METHODS, REQUESTS, requests
from benchmarks.presets import NAMES, PRESETS, default_preset

PROMPT, NEW = (512, 256) if DEVICE == "cuda" else (16, 4)
WARMUP = 2  # tokens


@pytest.mark.parametrize("method", METHODS)
def bench_mixed_batch(benchmark, record, request, method):
    preset = request.config.getoption("--preset") or default_preset(REQUESTS * PROMPT)
    gc.collect()  # the model of the method before
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(PRESETS[preset], dtype=DTYPE).eval()
    prompts = torch.randint(3, model.config.vocab_size, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(0))
    inputs = dict(input_ids=prompts.to(DEVICE), attention_mask=torch.ones_like(prompts, device=DEVICE))
    model, block, options = METHODS[method](model, requests(REQUESTS))

    def generate(tokens: int) -> None:
        model.generate(**inputs, **options, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"mixed_batch {NAMES[preset]} {REQUESTS} {PROMPT} + {NEW}"
    with block:
        generate(WARMUP)
        benchmark.pedantic(generate, args=(NEW,), rounds=1)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.mean
    record(
        group="mixed_batch", provider=method, mode="generate", shape=NAMES[preset], batch=REQUESTS, seq=PROMPT,
        milliseconds=seconds * 1e3, tokens_per_second=REQUESTS * NEW / seconds, new_tokens=NEW,
    )  # fmt: skip
