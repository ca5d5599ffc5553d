"""The op `rope_roae`: RoPE with RoAE on queries and keys, beside plain RoPE and beside plain PyTorch."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import accuracy
from benchmarks.cases import ACCURACY_CASES, CASES, DTYPE, Case
from benchmarks.passes import MODES, one_pass
from benchmarks.providers import PLAIN, ROPE_ROAE, eager, huggingface, leaves, rope_inputs
from rosa_kernels.offline import bytes_per_token, launches


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ROPE_ROAE)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_rope_roae(measure, case, provider, mode):
    x = rope_inputs(case)
    run = one_pass(mode, lambda: ROPE_ROAE[provider](x), leaves(x, provider))
    moved = {"bytes": launch_bytes(case, mode)} if provider == "fused" else {}
    measure(run, group="rope_roae", provider=provider, mode=mode, **case.labels, **moved)


@pytest.mark.parametrize("provider", ROPE_ROAE)
@pytest.mark.parametrize("case", ACCURACY_CASES, ids=str)
def bench_rope_roae_accuracy(record, case, provider):
    exact = huggingface if provider in PLAIN else eager
    errors = accuracy(provider, ROPE_ROAE[provider], exact, rope_inputs(case))
    record(group="rope_roae", provider=provider, mode="accuracy", **case.labels, **errors)


def launch_bytes(case: Case, mode: str) -> float:
    """Bytes that the op's launches must move: every tensor once."""
    tokens = case.batch * case.seq
    per_token = {
        launch.kernel.fn.__name__: bytes_per_token(launch, tokens)
        for launch in launches(case.shape, case.batch, case.seq, DTYPE)
    }
    passes = ("forward", "backward") if mode == "both" else (mode,)
    return tokens * sum(per_token[f"rope_roae_{name}_kernel"] for name in passes)
