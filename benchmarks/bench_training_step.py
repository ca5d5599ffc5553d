"""A whole training step of a Qwen2 causal language model with random weights: loss, backward and a real AdamW step.

`--preset tiny/0.5b/1.5b/7b` chooses the model, of the true Qwen2.5 configurations, vocabulary included; the default is
the largest whose estimated need is within nine tenths of the card's memory (`benchmarks.presets.needed_bytes`), and
`tiny` without a GPU. Every method starts from the same weights and takes the same batch: the paper's, of 2 x 230
tokens, and a usual one of 2 x 2,048. Liger's norms and SwiGLU run on a GPU where liger-kernel is installed.

The time of a step is the mean over whole rounds: with DLS a round is the interval between two selections, the selection
step included; else it is one step. It runs from one finished step to the next on the host's clock, which is what
training waits for. Peak memory is that of the same steps.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.cases import DEVICE, DTYPE
from benchmarks.liger import LIGER, unavailable
from benchmarks.methods import METHODS
from benchmarks.presets import NAMES, PRESETS, default_preset

BATCH = 2
SEQS = (230, 2048) if DEVICE == "cuda" else (32,)
STEPS = 8  # measured at least
WARMUP = 3
CASES = [
    pytest.param(
        method, marks=pytest.mark.skipif(LIGER in method and unavailable() is not None, reason=unavailable() or "")
    )
    for method in METHODS
]


@pytest.fixture
def preset(request):
    """The name of the model: as asked for, or what fits."""
    return request.config.getoption("--preset") or default_preset(BATCH * max(SEQS))


@pytest.fixture
def model(preset):
    """The model, always with the same weights."""
    gc.collect()  # of the method before, which pytest held until now
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(PRESETS[preset], dtype=DTYPE).train()


@pytest.mark.parametrize("seq", SEQS)
@pytest.mark.parametrize("method", CASES)
def bench_training_step(benchmark, record, model, preset, method, seq):
    tokens = torch.randint(model.config.vocab_size, (BATCH, seq), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    flops = base_flops(model, tokens.numel())
    training = METHODS[method](model, tokens)
    rounds = training.interval * -(-STEPS // training.interval)
    benchmark.group = f"training_step {NAMES[preset]} {BATCH} {seq}"
    fits = False
    try:
        for _ in range(WARMUP):
            training.step()
        peak = _peak_bytes(lambda: benchmark.pedantic(_finished(training.step), rounds=rounds))
        fits = True
    except torch.OutOfMemoryError:
        pass  # the skip stands below: within the exception it would keep the step's tensors alive
    if not fits:
        pytest.skip(f"{method} does not fit this card's memory with {NAMES[preset]}")
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.mean
    record(
        group="training_step", provider=method, mode="step", shape=NAMES[preset], batch=BATCH, seq=seq,
        milliseconds=seconds * 1e3, tokens_per_second=BATCH * seq / seconds, peak_bytes=peak,
        trainable_parameters=training.trainable_parameters, steps=rounds, flops=flops,
    )  # fmt: skip


def base_flops(model: nn.Module, tokens: int) -> int:
    """Operations that no method is spared: the linear layers forward, and the gradients of their inputs."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 2 * 2 * weights * tokens


def _finished(step):
    """The step and the wait for the device to finish it."""

    def finished() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return finished


def _peak_bytes(run) -> int | None:
    """Peak memory of `run` on the device; None on a CPU."""
    if DEVICE == "cpu":
        run()
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()
