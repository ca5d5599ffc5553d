"""The op `roae`: the whole of RoAE from the attention input H, Eq. 2 to 4 and RoPE, with float32 weights.

`separate` is GEMMs for Eq. 2 and 3 and then `rope_roae`; plain RoPE, for comparison, is measured beside `rope_roae`.
"""

from __future__ import annotations

import pytest

from benchmarks.accuracy import accuracy
from benchmarks.cases import ACCURACY_CASES, CASES
from benchmarks.passes import MODES, one_pass
from benchmarks.providers import ROAE, leaves, roae_eager, roae_inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ROAE)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_roae(measure, case, provider, mode):
    x = roae_inputs(case)
    run = one_pass(mode, lambda: ROAE[provider](x), leaves(x, provider))
    measure(run, group="roae", provider=provider, mode=mode, **case.labels)


@pytest.mark.parametrize("provider", ROAE)
@pytest.mark.parametrize("case", ACCURACY_CASES, ids=str)
def bench_roae_accuracy(record, case, provider):
    errors = accuracy(provider, ROAE[provider], roae_eager, roae_inputs(case))
    record(group="roae", provider=provider, mode="accuracy", **case.labels, **errors)
