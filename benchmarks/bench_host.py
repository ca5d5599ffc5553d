"""What a launch costs the host from a launch function to the driver, which is stubbed: the long way, and kept.

The long way is the launch function and Triton's `kernel[grid](...)`, as every launch went once and the first of a
layout still goes; kept is `rosa_kernels.kept`. Both allocate the outputs. Last come the launches of a step of `LAYERS`
layers, at the same length every step and at a new one. Times of this machine's CPU: what they say is the ratio.
"""

from __future__ import annotations

from itertools import count

import pytest
from triton import JITFunction

from benchmarks.host import calls, stubbed
from rosa_kernels.kept import run_launch
from rosa_kernels.offline import SHAPES
from rosa_kernels.roae_triton import roae_forward_kernel

pytestmark = pytest.mark.skipif(not isinstance(roae_forward_kernel, JITFunction), reason="the interpreter is on")

BATCH, SEQ = 2, 230  # the paper's
LAYERS = 28
WAYS = {
    "the long way": lambda launch, arguments: launch(*arguments).run(),
    "kept": lambda launch, arguments: run_launch(launch, *arguments),
}
STEP = ("roae forward", "roae keys' backward", "roae backward")


@pytest.fixture(autouse=True)
def _stubbed():
    with stubbed():
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", calls(SHAPES[0], 1, 1))
def bench_host(benchmark, name, way):
    benchmark.group = f"{name}, host time"
    launch, arguments = calls(SHAPES[0], BATCH, SEQ)[name]
    benchmark.pedantic(WAYS[way], (launch, arguments), rounds=100, iterations=20, warmup_rounds=1)


@pytest.mark.parametrize("lengths", ["the same length", "a new length"])
@pytest.mark.parametrize("way", WAYS)
def bench_host_step(benchmark, way, lengths):
    benchmark.group = f"a step's launches over {LAYERS} layers, host time"
    seqs = count(SEQ)

    def next_step():
        of = calls(SHAPES[0], BATCH, next(seqs) if lengths == "a new length" else SEQ)
        return ([of[name] for name in STEP],), {}

    def step(launches):
        for launch, arguments in launches * LAYERS:
            WAYS[way](launch, arguments)

    benchmark.pedantic(step, setup=next_step, rounds=50, warmup_rounds=2)
