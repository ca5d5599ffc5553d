"""How many programs the launches of `roae` aim at, from one token to many, beside signals from GEMMs of their own.

`PROGRAMS` of `rosa_kernels.roae_triton` is to be read off here, and whether separate products pay from some number of
tokens on. Forward and backward; of a single token, a step of generation, forward alone.
"""

from __future__ import annotations

import pytest

from benchmarks.cases import DEVICE, Case
from benchmarks.passes import one_pass
from benchmarks.providers import leaves, roae_fused, roae_inputs, roae_separate
from rosa_kernels import kept, roae_triton
from rosa_kernels.offline import SHAPES

AIMS = {f"{programs:,} programs": programs for programs in (256, 1024, 4096)}
LAUNCH_CASES = [Case(SHAPES[0], *tokens) for tokens in ((1, 1), (2, 230), (2, 2048), (1, 16384))]


@pytest.mark.skipif(DEVICE == "cpu", reason="the shape of a launch is for GPUs")
@pytest.mark.parametrize("provider", [*AIMS, "separate"])
@pytest.mark.parametrize("case", LAUNCH_CASES, ids=str)
def bench_launch_shape(measure, monkeypatch, case, provider):
    x = roae_inputs(case)
    if provider in AIMS:
        monkeypatch.setattr(roae_triton, "PROGRAMS", AIMS[provider])
        monkeypatch.setattr(kept, "KEPT", {})
    function = roae_separate if provider == "separate" else roae_fused
    mode = "forward" if case.seq == 1 else "both"
    run = one_pass(mode, lambda: function(x), leaves(x, provider))
    measure(run, group="launch_shape", provider=provider, mode=mode, **case.labels)
