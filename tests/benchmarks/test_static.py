"""The counted cost of a layer: what holds now, beside the frozen layer and peft's LoRA in the same run."""

import pytest
import torch
from transformers import AutoModel, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from triton.runtime.interpreter import GridExecutor

import rosa
from benchmarks import liger, static
from benchmarks.static import LAYERS, cost, decoded, forward, measure

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
        assert ours.forward < 0.54 * costs[name].forward and ours.backward < 0.62 * costs[name].backward


def test_what_only_hands_on_or_divides_a_tensor_launches_nothing():
    x = torch.ones(6)
    with static.Launches() as counted:
        torch.tensor([1, 2])
        x.view(2, 3).unbind()
        x.split(2)
    assert counted.count == 0
    with static.Launches() as counted:
        x.add_(1)
        torch.cat([x, x])
    assert counted.count == 2


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


def test_a_decoded_token_takes_fewer_launches_than_without_an_adapter(costs):
    """What the pass of a prompt takes, and two that put keys and values into the cache."""
    assert costs["frozen (no adapter)"].decode == 40
    assert costs["RoSA"].decode <= 35 and costs["RoSA, bfloat16 adapter"].decode <= 32
    for variant in (1, 2, 4):
        ours, theirs = (costs[f"RoAd_{variant}, all linears{end}"] for end in ("", " (peft)"))
        assert ours.decode <= 36 and ours.decode < theirs.decode / 3
    assert costs["RoSA"].decode < 0.55 * costs["LoRA r=16, all linears (peft)"].decode
    of_liger = {name: costs[f"{name}{liger.LIGER}"].decode for name in ("frozen (no adapter)", "RoSA")}
    assert of_liger["RoSA"] <= 18 < of_liger["frozen (no adapter)"]


def test_road_under_ligers_norms_and_swiglu(costs):
    """RoAd_2; RoAd_1 on an MLP is refused there, since Liger overwrites the output that it keeps."""
    base, ours, theirs = (
        costs[f"{name}{liger.LIGER}"]
        for name in ("frozen (no adapter)", "RoAd_2, all linears", "RoAd_2, all linears (peft)")
    )
    assert ours.forward <= 19 < base.forward and ours.backward <= 28 < base.backward and ours.decode <= 21 < base.decode
    assert ours.forward < theirs.forward / 5 and ours.backward < theirs.backward / 7
    assert ours.saved_per_token == base.saved_per_token + 2 * 49_664 and ours.saved_besides == 0
    model = AutoModel.from_config(Qwen2Config(**SMALL))
    liger.norms_and_swiglu(model)
    with pytest.raises(ValueError, match="Liger"):
        rosa.patch(model, rosa.RoadConfig(variant=1))


def test_ligers_norms_and_swiglu_halve_the_launches_and_save_a_third_less(costs):
    with_liger = {name: costs[f"{name}, Liger's norms and SwiGLU"] for name in ("frozen (no adapter)", "RoSA")}
    base, ours = with_liger.values()
    # Two norms of eight operators, and two operators of the MLP, are a launch each.
    assert base.forward == costs["frozen (no adapter)"].forward - 2 * 7 - 1
    assert ours.forward <= 17 and ours.backward <= 28 and ours.saved_per_token <= 117_500
    assert ours.forward < base.forward and ours.backward < base.backward and ours.saved_besides == 0
    lora = costs["LoRA r=16, all linears (peft), Liger's norms and SwiGLU"]
    assert ours.forward < lora.forward / 3 and ours.backward < 0.4 * lora.backward
    assert ours.saved_per_token < 0.75 * lora.saved_per_token


def test_liger_launches_and_saves_what_is_counted(monkeypatch):
    model = AutoModel.from_config(Qwen2Config(**SMALL)).requires_grad_(False)
    liger.norms_and_swiglu(model)
    hidden_states = torch.randn(1, 16, 128, requires_grad=True)
    rotary = model.rotary_emb(hidden_states, torch.arange(16)[None])
    launched = []  # Triton's interpreter cannot run all of them: what it is asked to run
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **options: launched.append(self.fn.__name__))
    out, saved = forward(model.layers[0], hidden_states, rotary)
    out.backward(torch.ones_like(out))
    stubs = []
    monkeypatch.setattr(liger, "launch", stubs.append)
    with liger.counted_launches():
        out, saved_by_stubs = forward(model.layers[0], hidden_states, rotary)
        out.backward(torch.ones_like(out))
    assert len(launched) == len(stubs) == 6 and saved_by_stubs == saved


def test_models_made_after_ligers_are_plain():
    liger.norms_and_swiglu(AutoModel.from_config(Qwen2Config(**SMALL)))
    plain = AutoModel.from_config(Qwen2Config(**SMALL)).layers[0]
    assert type(plain.input_layernorm) is Qwen2RMSNorm and type(plain.mlp) is Qwen2MLP


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
    assert decoded(model.eval()) == counted.decode
