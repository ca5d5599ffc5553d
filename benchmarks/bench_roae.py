"""The op `roae`: the whole of RoAE from the attention input H, Eq. 2 to 4 and RoPE, with float32 weights.

`separate` is GEMMs for Eq. 2 and 3 and then `rope_roae`; plain RoPE, for comparison, is measured beside `rope_roae`.
The bytes of the fused op are the fewest that any version of it can move, its GEMMs included.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.accuracy import accuracy
from benchmarks.cases import ACCURACY_CASES, CASES
from benchmarks.passes import MODES, one_pass
from benchmarks.providers import ROAE, RoaeInputs, leaves, roae_eager, roae_inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ROAE)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_roae(measure, case, provider, mode):
    x = roae_inputs(case)
    run = one_pass(mode, lambda: ROAE[provider](x), leaves(x, provider))
    moved = {"bytes": fewest_bytes(x, mode)} if provider == "fused" else {}
    measure(run, group="roae", provider=provider, mode=mode, **case.labels, **moved)


@pytest.mark.parametrize("provider", ROAE)
@pytest.mark.parametrize("case", ACCURACY_CASES, ids=str)
def bench_roae_accuracy(record, case, provider):
    errors = accuracy(provider, ROAE[provider], roae_eager, roae_inputs(case))
    record(group="roae", provider=provider, mode="accuracy", **case.labels, **errors)


def fewest_bytes(x: RoaeInputs, mode: str) -> int:
    """Bytes of what a pass must read and write, every tensor once."""
    heads, others = _bytes(x.q, x.k), _bytes(*x) - _bytes(x.q, x.k)
    forward = 2 * heads + others  # q and k read and written
    backward = heads + others + _bytes(*leaves(x, "fused"))  # the outputs' gradients, and one gradient for every leaf
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
