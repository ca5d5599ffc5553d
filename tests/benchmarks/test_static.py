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
    # Over the frozen layer: four casts of float32 weights and of their gradients, and those of the two float32 norms.
    assert ours.forward <= base.forward + 2 and ours.backward <= base.backward + 8
    without_casts = costs["RoSA, bfloat16 adapter"]
    assert without_casts.forward <= 34 and without_casts.backward <= base.backward
    for name in ("RoSA, naive PyTorch", "LoRA r=16, all linears (peft)"):
        assert ours.forward < 0.65 * costs[name].forward and ours.backward < 0.7 * costs[name].backward


def test_saved_bytes(costs):
    assert costs["frozen (no adapter)"].saved_per_token == 159_352
    assert costs["RoSA"].saved_per_token <= 187_256
    assert costs["RoSA, frozen by DLS"].saved_per_token <= 163_500
    assert costs["RoSA"].saved_per_token < costs["RoSA, naive PyTorch"].saved_per_token
    assert costs["RoSA"].saved_per_token < costs["LoRA r=16, all linears (peft)"].saved_per_token
