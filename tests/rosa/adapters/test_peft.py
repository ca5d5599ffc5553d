"""RoSA together with PEFT: LoRA before `patch` or after it, each trained, saved and taken off on its own."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

import rosa

CONFIG = rosa.RosaConfig(rank=4)


def lora(**changes):
    return LoraConfig(**dict(r=2, target_modules="all-linear", init_lora_weights=True, task_type="CAUSAL_LM") | changes)


def stir_lora(model):
    """Gives LoRA's B values, as training would."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.fixture(params=["LoRA first", "RoSA first"])
def both(request, make_model, stir):
    """A model with LoRA and RoSA, both of effect, as PEFT wraps it."""
    model = make_model()
    if request.param == "RoSA first":
        rosa.patch(model, CONFIG)
    peft_model = stir_lora(get_peft_model(model, lora()))
    if request.param == "LoRA first":
        assert rosa.patch(peft_model, CONFIG) is peft_model
    rosa.trainable_parameters(peft_model)
    stir(model)
    return peft_model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def is_rosas(name):
    return ".roae." in name or name.endswith("layernorm.weight")


def test_both_train_and_nothing_else_does(both, batch):
    names = trainable(both)
    assert all(is_rosas(name) or "lora_" in name for name in names)
    assert sum(map(is_rosas, names)) == 4 * (4 + 2) and sum("lora_" in name for name in names) == 4 * 7 * 2
    assert {id(p) for p in rosa.trainable_parameters(both)} == {id(p) for p in both.parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in both.named_parameters()}
    optimizer = torch.optim.AdamW(rosa.trainable_parameters(both), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = both(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    assert {name for name, p in both.named_parameters() if not torch.equal(p, before[name])} == names


def test_all_linear_leaves_the_adapter_alone(both):
    wrapped = {name for name, module in both.named_modules() if hasattr(module, "lora_A")}
    assert len(wrapped) == 4 * 7 and not any("roae" in name for name in wrapped)


def test_each_is_saved_and_loaded_on_its_own(both, make_model, batch, tmp_path):
    both.save_pretrained(tmp_path / "lora")
    rosa.save_adapter(both, tmp_path / "rosa")
    of_lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    of_rosa = load_file(tmp_path / "rosa" / "adapter_model.safetensors")
    assert len(of_lora) == 4 * 7 * 2 and all("lora_" in name for name in of_lora)
    assert len(of_rosa) == 4 * 6 and all(is_rosas(name) for name in of_rosa)
    expected = logits(both, batch)
    lora_first = PeftModel.from_pretrained(make_model(), tmp_path / "lora")
    assert torch.equal(logits(rosa.load_adapter(lora_first, tmp_path / "rosa").eval(), batch), expected)
    rosa_first = rosa.load_adapter(make_model(), tmp_path / "rosa")
    assert torch.equal(logits(PeftModel.from_pretrained(rosa_first, tmp_path / "lora").eval(), batch), expected)


@pytest.mark.parametrize("merge", [True, False])
def test_lora_is_taken_off_and_then_rosa(both, make_model, batch, merge):
    together, fresh = logits(both, batch), make_model().eval()
    base = both.merge_and_unload() if merge else both.unload()
    assert not any("lora_" in name for name, _ in base.named_parameters())
    assert rosa.is_patched(base) and ((logits(base, batch) - together).abs().max() < 1e-4) == merge
    rosa.unpatch(base)
    assert dict(base.named_parameters()).keys() == dict(fresh.named_parameters()).keys()
    assert torch.equal(logits(base, batch), logits(fresh, batch)) != merge


def test_rosa_under_lora_is_taken_off_only_after_lora(make_patched, batch):
    model = make_patched().eval()
    expected = logits(model, batch)
    peft_model = get_peft_model(model, lora())
    with pytest.raises(ValueError, match="have other names since it was patched.*undo what renamed them first"):
        rosa.unpatch(peft_model)
    assert rosa.is_patched(peft_model) and torch.equal(logits(peft_model, batch), expected)


def test_rosa_over_lora_is_taken_off_first_or_last(make_model, batch, stir):
    peft_model = stir_lora(get_peft_model(make_model(), lora())).eval()
    expected, names = logits(peft_model, batch), trainable(peft_model)
    stir(rosa.patch(peft_model, CONFIG))
    assert not torch.equal(logits(peft_model, batch), expected)
    rosa.unpatch(peft_model)
    assert torch.equal(logits(peft_model, batch), expected) and trainable(peft_model) == names


def test_lora_of_transformers_own_goes_on_to_train(make_model):
    model = make_model()
    model.add_adapter(lora())
    names = trainable(model)
    rosa.patch(model, CONFIG)
    assert names < trainable(model) and all(is_rosas(name) for name in trainable(model) - names)
    assert trainable(rosa.unpatch(model)) == names


def test_what_get_peft_model_froze_of_rosa_trains_again(make_patched):
    peft_model = get_peft_model(make_patched(), lora())
    assert not any(is_rosas(name) for name in trainable(peft_model))
    count = rosa.count_parameters(peft_model)[0]
    assert not any(is_rosas(name) for name in trainable(peft_model))  # counting changes nothing
    assert count == sum(p.numel() for p in rosa.trainable_parameters(peft_model))
    assert sum(map(is_rosas, trainable(peft_model))) == 4 * 6


def select(model, batch, mode):
    """Some steps of layer selection; returns the selections, and for each layer whether its parameters have moved."""
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2)
    optimizer = rosa.DynamicLayerSelection(adamw, model, k_ratio=0.25, interval=1, p_exploit=1.0, mode=mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in moved}
    optimizer.unfreeze()
    return {layer for made in optimizer.history for layer in made.layers}, layers, moved


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_layer_selection_over_lora_alone(make_model, batch, mode):
    model = stir_lora(get_peft_model(make_model(), lora())).train()
    names = trainable(model)
    chosen, layers, moved = select(model, batch, mode)
    assert layers == chosen and len(chosen) < 4
    assert all("lora_" in name for name in moved) and trainable(model) == names


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_layer_selection_over_lora_and_rosa(both, batch, mode):
    names = trainable(both)
    chosen, layers, moved = select(both.train(), batch, mode)
    assert layers == chosen and len(chosen) < 4
    assert any("lora_" in name for name in moved) and any(map(is_rosas, moved)) and trainable(both) == names


@pytest.mark.parametrize("first", ["PEFT", "RoSA"])
@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts(make_model, batch, stir, config, first):
    config, model = config(task_type="CAUSAL_LM", num_virtual_tokens=3), make_model()
    if first == "RoSA":
        rosa.patch(model, CONFIG)
    peft_model = get_peft_model(model, config)
    if first == "PEFT":
        rosa.patch(peft_model, CONFIG)
    trained = rosa.trainable_parameters(peft_model)
    stir(model)
    peft_model(**batch).loss.backward()
    names = trainable(peft_model)
    assert {id(p) for p in trained} == {id(p) for n, p in peft_model.named_parameters() if n in names}
    assert any("prompt" in name for name in names) and sum(map(is_rosas, names)) == 4 * 6
    assert all(p.grad.norm() > 0 for name, p in peft_model.named_parameters() if name in names)
