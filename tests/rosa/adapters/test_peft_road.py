"""RoAd adapters of peft's, loaded and written: equal to peft's own model."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import rosa
from rosa.adapters.folder import is_peft
from rosa.training.methods import load_trained
from tests.rosa.families import make_model as make_family

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def road_of_peft(model, variant="road_2", **config):
    """The model in peft's wrapper, with angles and scales as after training."""
    config = dict(target_modules=["q_proj", "v_proj"], group_size=8) | config
    torch.manual_seed(5)
    model = peft.get_peft_model(model, peft.RoadConfig(variant=variant, init_weights=False, **config))
    assert any("road_theta" in name for name, _ in model.named_parameters())
    return model


@pytest.fixture
def of_peft(make_model, tmp_path):
    """A folder that peft wrote."""
    road_of_peft(make_model("llama")).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize("group_size", [2, 4, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pefts_adapter_computes_what_it_does_in_peft_and_goes_back_equal(
    make_model, batch, tmp_path, variant, group_size
):
    theirs = road_of_peft(make_model("qwen2"), variant, group_size=group_size, target_modules="all-linear")
    theirs.save_pretrained(tmp_path / "peft")
    expected = logits(theirs, batch)
    base = make_model("qwen2")
    before = logits(base, batch)
    assert not torch.allclose(expected, before, atol=1e-2)
    ours = rosa.load_adapter(base, tmp_path / "peft")
    torch.testing.assert_close(logits(ours, batch), expected, atol=1e-5, rtol=1e-5)
    config = ours._rosa.active_adapter.config
    pairing = "neighbours" if group_size == 2 else group_size
    assert config == rosa.RoadConfig(VARIANTS[variant], pairing=pairing)

    rosa.save_adapter(ours, tmp_path / "back", as_peft=True)
    assert sorted(os.listdir(tmp_path / "back")) == [CONFIG, WEIGHTS]
    first, again = (load_file(tmp_path / name / WEIGHTS) for name in ("peft", "back"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    again = peft.PeftModel.from_pretrained(make_model("qwen2"), tmp_path / "back")
    assert torch.equal(logits(again, batch), expected)
    assert torch.equal(logits(rosa.unpatch(ours), batch), before)


@pytest.mark.parametrize("pairing", ["neighbours", "half", 4, 16])
@pytest.mark.parametrize("variant", [1, 2, 4])
def test_our_adapter_computes_in_peft_what_it_does_here(make_model, batch, tmp_path, variant, pairing):
    config = rosa.RoadConfig(variant, targets=("q_proj", "o_proj", "up_proj"), pairing=pairing, layers=(0, 2))
    ours = rosa.patch(make_model("llama"), config)
    with torch.no_grad():
        for parameter in rosa.trainable_parameters(ours):
            parameter += 0.3 * torch.randn_like(parameter)
    rosa.save_adapter(ours, tmp_path, as_peft=True)
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path)
    torch.testing.assert_close(logits(theirs, batch), logits(ours, batch), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].task_type == "CAUSAL_LM" and is_peft(tmp_path)
    again = rosa.load_adapter(make_model("llama"), tmp_path)
    assert torch.equal(logits(again, batch), logits(ours, batch))


@pytest.mark.parametrize(
    "target_modules, targets, layers",
    [
        (["v_proj", "q_proj"], ("q_proj", "v_proj"), None),
        (r".*\.[13]\..*(q|up)_proj", ("q_proj", "up_proj"), (1, 3)),
        (["layers.2.mlp.up_proj", "down_proj"], None, None),
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "all-linear", None),
    ],
    ids=str,
)
def test_the_layers_are_those_in_the_file(make_model, batch, tmp_path, target_modules, targets, layers):
    theirs = road_of_peft(make_model("llama"), target_modules=target_modules)
    theirs.save_pretrained(tmp_path)
    ours = rosa.load_adapter(make_model("llama"), tmp_path)
    config = ours._rosa.active_adapter.config
    if targets is None:  # no ends of names say it
        places = [f"model.layers.{i}.mlp.down_proj" for i in range(4)] + ["model.layers.2.mlp.up_proj"]
        assert sorted(config.targets) == sorted(places) and config.layers is None
    else:
        assert (config.targets, config.layers) == (targets, layers)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), atol=1e-5, rtol=1e-5)


def test_fused_layers_go_both_ways(batch, tmp_path):
    theirs = road_of_peft(make_family("phi3"), "road_4", target_modules=["qkv_proj", "gate_up_proj"], group_size=16)
    theirs.save_pretrained(tmp_path)
    ours = rosa.load_adapter(make_family("phi3"), tmp_path)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), atol=1e-5, rtol=1e-5)


def test_a_loaded_adapter_is_one_like_any_other(of_peft, make_model, batch, tmp_path):
    model = rosa.load_adapter(make_model("llama"), of_peft, "theirs")
    expected = logits(model, batch)
    rosa.patch(model, rosa.RosaConfig(rank=4), "ours")
    rosa.load_adapter(model, of_peft, "theirs")  # into the one that is there
    assert rosa.adapter_names(model) == ["theirs", "ours"] and torch.equal(logits(model, batch), expected)
    rosa.save_adapter(model, tmp_path / "saved")
    assert torch.equal(logits(rosa.load_adapter(make_model("llama"), tmp_path / "saved"), batch), expected)
    torch.testing.assert_close(logits(rosa.merge(model), batch), expected, atol=1e-5, rtol=1e-5)
    rosa.unmerge(model)(**batch).loss.backward()
    assert all(p.grad is not None for p in rosa.trainable_parameters(model))


def test_values_of_16_bits_are_widened_as_peft_does(of_peft, make_model, batch):
    tensors = load_file(of_peft / WEIGHTS)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, of_peft / WEIGHTS)
    ours = rosa.load_adapter(make_model("llama"), of_peft)
    assert all(parameter.dtype == torch.float32 for parameter in rosa.trainable_parameters(ours))
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), of_peft)
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), atol=1e-5, rtol=1e-5)


def test_programs_that_take_any_adapter_run_pefts_road_by_ours(of_peft, make_model, batch):
    model = load_trained(make_model("llama"), of_peft)
    assert rosa.is_patched(model) and not isinstance(model, peft.PeftModel)
    expected = logits(peft.PeftModel.from_pretrained(make_model("llama"), of_peft), batch)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


def test_one_form_replaces_the_other_in_a_folder(make_model, tmp_path):
    model = rosa.patch(make_model("llama"), rosa.RoadConfig())
    rosa.save_adapter(model, tmp_path)
    rosa.save_adapter(model, tmp_path, as_peft=True)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS] and is_peft(tmp_path)
    rosa.save_adapter(model, tmp_path)
    assert CONFIG not in os.listdir(tmp_path) and not is_peft(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    rosa.save_adapter(model, tmp_path, as_peft=True)
    assert (tmp_path / "README.md").read_text() == "mine"
    make_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model"):
        rosa.save_adapter(model, tmp_path / "model", as_peft=True)


@pytest.mark.parametrize(
    "config, message",
    [
        (rosa.RosaConfig(rank=4), "this one is RoSA's"),
        (rosa.RoadConfig(train_norms=True), "has 8 of them"),
        (
            rosa.RoadConfig(pairing="rope"),
            r"pairs model.layers.0.self_attn.q_proj in groups of 16 and model.layers.0.self_attn.v_proj in groups of 2",
        ),
    ],
    ids=["RoSA", "norms", "pairings"],
)
def test_what_peft_has_no_form_for_is_not_written(make_model, tmp_path, config, message):
    model = rosa.patch(make_model("llama"), config)
    with pytest.raises(ValueError, match=message):
        rosa.save_adapter(model, tmp_path / "out", as_peft=True)
    assert not (tmp_path / "out").exists()


def test_partial_rotation_and_transposed_layers_have_no_form_in_peft(tmp_path, make_model):
    model = rosa.patch(make_family("nemotron"), rosa.RoadConfig(pairing="rope"))
    with pytest.raises(ValueError, match="q_proj pairs 8 of 16 elements a head as RoPE does"):
        rosa.save_adapter(model, tmp_path, as_peft=True)
    with pytest.raises(ValueError, match="transformer.h.0.attn.c_attn is a Conv1D"):
        rosa.save_adapter(rosa.patch(make_family("gpt2"), rosa.RoadConfig()), tmp_path, as_peft=True)
    rosa.save_adapter(
        rosa.patch(make_model("llama"), rosa.RoadConfig(targets=("q_proj", "k_proj"), pairing="rope")),
        tmp_path,
        as_peft=True,
    )
    assert json.loads((tmp_path / CONFIG).read_text())["group_size"] == 16


def refused(model, folder, error, match):
    """`load_adapter` says why it does not, and changes nothing."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        rosa.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not rosa.is_patched(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LORA"}, r"of type 'LORA'.*peft.PeftModel.from_pretrained"),
        ({"peft_type": None}, "of type None"),
        ({"variant": "road_3"}, "its variant is 'road_3', known are road_1, road_2, road_4"),
        ({"variant": [1]}, r"its variant is \[1\]"),
        ({"group_size": 7}, "its group_size is 7, expected an even number"),
        ({"group_size": "half"}, "its group_size is 'half'"),
        ({"group_size": True}, "its group_size is True"),
        ({"group_size": 10}, "q_proj cannot be paired in groups of 10: its 64 outputs are no multiple of 10"),
        ({"variant": "road_1"}, r"q_proj.road.theta is \[64\], expected \[32\]"),
    ],
    ids=str,
)
def test_a_configuration_of_pefts_that_does_not_fit_is_refused(of_peft, make_model, change, message):
    config = json.loads((of_peft / CONFIG).read_text())
    (of_peft / CONFIG).write_text(json.dumps(config | change))
    refused(make_model("llama"), of_peft, rosa.AdapterError, message)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


NAME = "base_model.model.model.layers.1.self_attn.q_proj.road_theta"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: without(t, NAME), "layers.1.self_attn.q_proj.road.theta is missing"),
        (lambda t: t | {NAME: t[NAME][:6].clone()}, r"q_proj.road.theta is \[6\], expected \[64\]"),
        (lambda t: t | {NAME: t[NAME] / 0}, "q_proj.road.theta holds values that are not finite"),
        (lambda t: t | {NAME: t[NAME].int()}, "q_proj.road.theta holds I32"),
        (
            lambda t: t | {"base_model.model.lm_head.weight": t[NAME].clone()},
            "its weights hold base_model.model.lm_head.weight",
        ),
        (lambda t: t | {NAME.replace("1", "9"): t[NAME].clone()}, "layers.9.self_attn.q_proj is no linear layer"),
        (
            lambda t: t | {"base_model.model.lm_head.road_theta": t[NAME].clone()},
            "lm_head is no linear layer in the decoder",
        ),
        (lambda t: {}, "its weights hold nothing"),
    ],
    ids=["missing", "short", "infinite", "integers", "more", "no such layer", "the output layer", "none"],
)
def test_weights_of_pefts_that_do_not_fit_are_refused(of_peft, make_model, change, message):
    save_file(change(load_file(of_peft / WEIGHTS)), of_peft / WEIGHTS)
    refused(make_model("llama"), of_peft, rosa.AdapterError, message)


def test_an_adapter_of_another_base_is_refused(of_peft, make_model):
    refused(
        make_model("llama", num_hidden_layers=2), of_peft, rosa.AdapterError, "layers.2.self_attn.q_proj is no linear"
    )
    refused(make_model("llama", num_attention_heads=2), of_peft, rosa.AdapterError, r"is \[64\], expected \[32\]")


def test_damaged_files_of_pefts_are_refused_by_name(of_peft, make_model):
    content = (of_peft / WEIGHTS).read_bytes()
    for length in (0, 7, 1000, len(content) - 1):
        (of_peft / WEIGHTS).write_bytes(content[:length])
        refused(make_model("llama"), of_peft, rosa.AdapterError, f"{WEIGHTS} is truncated or no safetensors file")
    (of_peft / WEIGHTS).unlink()
    refused(make_model("llama"), of_peft, FileNotFoundError, f"{WEIGHTS} is missing")
    (of_peft / WEIGHTS).write_bytes(content)
    (of_peft / CONFIG).write_bytes(b'{"peft_type": "RO')
    refused(make_model("llama"), of_peft, rosa.AdapterError, f"{CONFIG} is damaged")


@pytest.mark.parametrize("variant, percent", [(1, "0.020"), (2, "0.040"), (4, "0.081")])
def test_llama_7b_has_as_many_parameters_as_in_the_paper(variant, percent):
    with torch.device("meta"):
        model = rosa.patch(LlamaForCausalLM(LlamaConfig()), rosa.RoadConfig(variant))
    trainable, total, share = rosa.count_parameters(model)
    assert total - trainable == 6_738_415_616  # LLaMA-7B
    assert f"{share:.3f}" == percent
