"""What the constants of `roae`'s launches are to be, from one token to many: one of them changed at a time.

A row is a value of a constant of `rosa_kernels.roae_triton`, beside all of them as they are; from one run each constant
is to be read off, and whether signals from GEMMs of their own (`separate`) pay from some number of tokens on. Forward
and backward; of a single token, a step of generation, forward alone. On a CPU nothing is launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.cases import DEVICE, SMALL, Case
from benchmarks.passes import one_pass
from benchmarks.providers import leaves, roae_fused, roae_inputs, roae_separate
from rosa_kernels import kept, roae_triton
from rosa_kernels.offline import SHAPES

TOKENS = ((1, 1), (2, 230), (2, 2048), (1, 16384)) if DEVICE == "cuda" else ((1, 1), (2, 64))
LAUNCH_CASES = [Case(SHAPES[0] if DEVICE == "cuda" else SMALL, *tokens) for tokens in TOKENS]
CONSTANTS = {
    "PROGRAMS": (256, 1024, 4096),
    "NUM_WARPS": (4, 8),  # with 8 a program has 64 tokens, which is wgmma on sm_90
    "HEAD_STAGES": (1, 2),
    "KEY_PROGRAMS": (1, 128, 512),  # 1: Eq. 3 is never divided
    "KEYS_AHEAD_BELOW": (0, 8192, 2**31 - 1),  # tokens: the keys never come first, or always
    "BLOCK_S": (32, 64),
}
AS_IT_IS = "as it is"
CHANGES = {
    f"{name} = {value:,}": (name, value)
    for name, values in CONSTANTS.items()
    for value in values
    if value != getattr(roae_triton, name)
}


@pytest.mark.parametrize("provider", [AS_IT_IS, *CHANGES, "separate"])
@pytest.mark.parametrize("case", LAUNCH_CASES, ids=str)
def bench_launch_shape(measure, case, provider):
    x = roae_inputs(case)
    function = roae_separate if provider == "separate" else roae_fused
    mode = "forward" if case.seq == 1 else "both"
    with changed(provider):
        run = one_pass(mode, lambda: function(x), leaves(x, provider))
        measure(run, group="launch_shape", provider=provider, mode=mode, **case.labels)


@contextmanager
def changed(provider: str) -> Iterator[None]:
    """The constants as the row `provider` of CHANGES has them; of other rows, as they are."""
    with pytest.MonkeyPatch.context() as patch:
        if provider in CHANGES:
            patch.setattr(roae_triton, *CHANGES[provider])
            patch.setattr(kept, "KEPT", {})  # launches kept by their arguments know no constants
        yield
