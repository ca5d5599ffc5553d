"""The counted cost of a layer: what holds now, beside the frozen layer and peft's LoRA in the same run."""

import pytest

from benchmarks.static import LAYERS, cost


@pytest.fixture(scope="module")
def costs():
    """The costs by name, with the kernels as launches; in the interpreter where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSA_BACKEND", "triton")
        names = [name for name in LAYERS if not name.startswith("DoRA")]  # which takes half a minute
        return {name: cost(LAYERS[name]) for name in names}


def test_launches(costs):
    base, ours = costs["frozen (no adapter)"], costs["RoSA"]
    assert base.forward == 38
    assert ours.forward <= 34 and ours.backward <= 62
    frozen = costs["RoSA, frozen by DLS"]
    assert frozen.forward <= 34 and frozen.backward < base.backward
    for name in ("RoSA, naive PyTorch", "LoRA r=16, all linears (peft)"):
        assert ours.forward <= costs[name].forward / 2 and ours.backward < 0.62 * costs[name].backward


def test_saved_bytes(costs):
    assert costs["frozen (no adapter)"].saved_per_token == 159_352
    assert costs["RoSA"].saved_per_token <= 185_000
    assert costs["RoSA, frozen by DLS"].saved_per_token <= 163_500
    assert costs["RoSA"].saved_besides == costs["RoSA, frozen by DLS"].saved_besides == 0  # no copies of weights
    for name in ("RoSA, naive PyTorch", "LoRA r=16, all linears (peft)"):
        assert costs["RoSA"].saved_per_token < costs[name].saved_per_token
