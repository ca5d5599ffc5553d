"""The counted cost of a layer: what holds now, beside the frozen layer and peft's LoRA in the same run."""

import pytest
import torch
from transformers import AutoModel, Qwen2Config

from benchmarks import static
from benchmarks.static import LAYERS, cost, measure

SMALL = dict(static.SHAPE, hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def costs():
    """The costs by name, with the kernels as launches; in the interpreter where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSA_BACKEND", "triton")
        return {name: cost(adapt) for name, adapt in LAYERS.items()}


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


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road_costs_five_launches_forward_and_eleven_backward_on_top_of_rope_in_one(costs, variant):
    base, ours, theirs = (
        costs[name]
        for name in (
            "frozen, RoPE in one launch", f"RoAd_{variant}, all linears", f"RoAd_{variant}, all linears (peft)"
        )
    )  # fmt: skip
    assert ours.forward <= base.forward + 5 and ours.backward <= base.backward + 12
    assert ours.forward < costs["frozen (no adapter)"].forward
    assert ours.forward < theirs.forward / 3 and ours.backward < theirs.backward / 4


def test_road_saves_two_bytes_an_output_at_most(costs):
    base, outputs, to_the_residual = costs["frozen (no adapter)"].saved_per_token, 49_664, 2 * 3584
    # What follows saves the outputs of all layers but those whose output is added to the residual.
    assert costs["RoAd_1, all linears"].saved_per_token == base + 2 * to_the_residual
    for variant in (2, 4):
        assert costs[f"RoAd_{variant}, all linears"].saved_per_token == base + 2 * outputs
        assert costs[f"RoAd_{variant}, all linears (peft)"].saved_per_token > base + 7 * outputs
    assert all(costs[f"RoAd_{variant}, all linears"].saved_besides == 0 for variant in (1, 2, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_tensors_without_numbers_cost_what_real_ones_do(name, monkeypatch):
    monkeypatch.setenv("ROSA_BACKEND", "triton")
    monkeypatch.setattr(static, "SHAPE", SMALL)
    model = AutoModel.from_config(Qwen2Config(**SMALL), dtype=torch.bfloat16).requires_grad_(False).train()
    LAYERS[name](model)
    hidden_states = torch.randn(1, 16, 128, dtype=torch.bfloat16, requires_grad=True)
    found = measure(model.layers[0], hidden_states, model.rotary_emb(hidden_states, torch.arange(16)[None]))
    counted = cost(LAYERS[name])
    assert found == (counted.forward, counted.backward, 16 * counted.saved_per_token + counted.saved_besides)
