"""What adapters stand in, wrapped, replaced or copied by PEFT: what goes on as before, and what is refused."""

import copy
import pickle

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rosa

TARGETS = ("q_proj", "v_proj", "down_proj")
ROAD = rosa.RoadConfig(variant=2, targets=TARGETS)
ROSA = rosa.RosaConfig(rank=4)


def lora(**changes):
    return LoraConfig(**dict(r=2, target_modules=list(TARGETS), init_lora_weights=False) | changes)


def stirred(model, size=0.3):
    """The model with what its active adapter trains at values as after training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in rosa.trainable_parameters(model):
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def own_gradients(model, batch):
    """Those of what the active adapter trains, after a pass of the model."""
    rosa.trainable_parameters(model)
    model(**batch).loss.backward()
    return [parameter.grad for name, parameter in model.named_parameters() if ".road." in name]


@pytest.fixture
def over(make_model, batch, tmp_path):
    """A model with RoAd "a", LoRA without effect over it, and the same adapter as "b", loaded since."""
    model = stirred(rosa.patch(make_model("llama"), ROAD, "a"))
    rosa.save_adapter(model, tmp_path)
    expected = logits(model, batch)
    model = get_peft_model(model, lora(init_lora_weights=True))
    assert torch.equal(logits(model, batch), expected)
    return rosa.load_adapter(model, tmp_path, "b"), expected


@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle"])
def test_an_adapter_that_is_added_over_lora_acts_trains_and_is_taken_off(over, make_model, batch, way):
    model, expected = over
    copies = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
    model = copies[way](model)
    for name in ("b", "a", "b"):
        rosa.set_adapter(model, name)
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    with rosa.disabled(model):
        torch.testing.assert_close(logits(model, batch), logits(make_model("llama"), batch), atol=1e-5, rtol=1e-5)
    gradients = own_gradients(model, batch)
    assert len(gradients) == 2 * 4 * 3 and all(grad is not None and grad.norm() > 0 for grad in gradients)
    base = rosa.unpatch(model.unload())
    assert torch.equal(logits(base, batch), logits(make_model("llama"), batch)) and not rosa.is_patched(base)
    assert not any(module._forward_hooks for module in base.modules())


def test_adapters_of_one_layer_in_different_modules_share_no_batch(over, batch):
    model, expected = over
    refusal = pytest.raises(ValueError, match=r"'a' and 'b' cannot share a batch: .*layers.0.self_attn.q_proj")
    with refusal, rosa.adapters_by_row(model, ["a", "b"]):
        pass
    for name in ("a", "b"):
        with rosa.adapters_by_row(model, [name, name]):
            torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


def calls(folder):
    """What asks that adapters are where they were put."""
    return {
        "merge": rosa.merge,
        "trainable_parameters": rosa.trainable_parameters,
        "set_adapter": lambda model: rosa.set_adapter(model, "default"),
        "patch": lambda model: rosa.patch(model, ROAD, "another"),
        "load_adapter": lambda model: rosa.load_adapter(model, folder),
        "adapters_by_row": lambda model: rosa.adapters_by_row(model, ["default"]).__enter__(),
        "disabled": lambda model: rosa.disabled(model).__enter__(),
    }


def peft_taken_off(model, folder):
    peft_model = get_peft_model(model, lora())
    return stirred(rosa.patch(peft_model, ROAD)), peft_model.merge_and_unload


def dequantized(model, folder):
    model.save_pretrained(folder / "base")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=quantization)
    return stirred(rosa.patch(model, ROAD)), model.dequantize


@pytest.mark.parametrize("replaced", [peft_taken_off, dequantized])
def test_where_its_linear_layers_were_replaced_the_user_is_told_and_the_adapter_can_be_saved(
    make_model, batch, tmp_path, replaced
):
    model, replace = replaced(make_model("llama"), tmp_path)
    adapted = logits(model, batch)
    rosa.save_adapter(model, tmp_path / "before")
    model = replace()
    for call in calls(tmp_path / "before").values():
        with pytest.raises(
            ValueError, match=r"'default' does nothing at .*layers.0.*_proj.*replaced since.*rosa.save_adapter"
        ):
            call(model)
    # What the message says.
    rosa.save_adapter(model, tmp_path / "after")
    rosa.unpatch(model)
    rosa.load_adapter(model, tmp_path / "after")
    torch.testing.assert_close(logits(model, batch), adapted, atol=0.02, rtol=0.02)
    torch.testing.assert_close(logits(rosa.merge(model), batch), adapted, atol=0.02, rtol=0.02)


COPIES = {
    "a linear layer": (ROAD, lora(target_modules=["o_proj"], modules_to_save=["v_proj"]), "self_attn.v_proj"),
    "what holds one": (ROAD, lora(target_modules=["o_proj"], modules_to_save=["mlp"]), "mlp.*.down_proj"),
    "attention": (ROSA, lora(target_modules=["up_proj"], modules_to_save=["self_attn"]), "self_attn"),
    "a norm": (ROSA, lora(modules_to_save=["input_layernorm"]), "input_layernorm"),
    "a norm by LN tuning": (ROSA, LNTuningConfig(target_modules=["input_layernorm"]), "input_layernorm"),
}


@pytest.mark.parametrize("case", COPIES)
def test_where_peft_trains_a_copy_of_what_it_stands_in_the_user_is_told(make_model, batch, tmp_path, case):
    config, of_peft, name = COPIES[case]
    model = stirred(rosa.patch(make_model("llama"), config), size=0.1)
    adapted = logits(model, batch)
    rosa.save_adapter(model, tmp_path / "before")
    saved = (tmp_path / "before" / "adapter_model.safetensors").read_bytes()
    peft_model = get_peft_model(model, of_peft)
    refused = calls(tmp_path / "before") | {"save_adapter": lambda model: rosa.save_adapter(model, tmp_path / "before")}
    for call in refused.values():
        with pytest.raises(ValueError, match=rf"layers.0.{name}.* is a copy.*delete_adapter.*modules_to_save"):
            call(peft_model)
    assert (tmp_path / "before" / "adapter_model.safetensors").read_bytes() == saved
    peft_model.delete_adapter("default")
    model = peft_model.unload()
    assert torch.equal(logits(model, batch), adapted) and len(rosa.trainable_parameters(model)) > 0


def test_a_copy_that_took_its_place_for_good_is_not_unpatched_by_halves(make_model):
    peft_model = get_peft_model(make_model("llama"), lora())
    stirred(rosa.patch(peft_model, ROSA))
    peft_model.add_adapter("second", lora(modules_to_save=["input_layernorm"]))
    with pytest.raises(ValueError, match="layers.0.input_layernorm.* is a copy"):
        rosa.unpatch(peft_model)
    assert rosa.is_patched(peft_model) and rosa.active_adapter(peft_model) == "default"


@pytest.mark.parametrize("config", [ROAD, ROSA])
def test_what_peft_trains_of_a_model_without_an_adapter_there_is_left_alone(make_model, batch, config):
    """Heads and what no adapter stands in may be saved beside it, before `patch` and after."""
    beside = lora(target_modules=["o_proj"], modules_to_save=["lm_head"])
    for first in (True, False):
        model = make_model("llama")
        model = get_peft_model(rosa.patch(model, config), beside) if first else get_peft_model(model, beside)
        if not first:
            rosa.patch(model, config)
        assert any("lm_head.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
        assert len(rosa.trainable_parameters(model)) > 0
    for norms in (LNTuningConfig(target_modules=["input_layernorm"]), lora(modules_to_save=["input_layernorm"])):
        model = rosa.patch(get_peft_model(make_model("llama"), norms), ROSA)
        model(**batch).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("default.weight"))
        assert len(rosa.trainable_parameters(model)) > 0
