"""Gradient checkpointing, reentrant and not: training takes bitwise the same course with it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import rosa


def train(model, batch, **dls):
    model.train()
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2)
    optimizer = rosa.DynamicLayerSelection(adamw, model, interval=2, p_exploit=0.3, **dls)
    for _ in range(12):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.unfreeze()
    assert len(set(optimizer.history)) == 6
    return [p.detach().clone() for p in rosa.trainable_parameters(model)]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_layer_selection_takes_the_same_course(make_patched, batch, mode, reentrant):
    expected = train(make_patched(), batch, mode=mode)
    model = make_patched()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = train(model, batch, mode=mode)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("lora_first", [True, False])
def test_with_lora_too(make_model, batch, stir, lora_first, reentrant):
    def make():
        model = make_model() if lora_first else rosa.patch(make_model(), rosa.RosaConfig(rank=4))
        peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        if lora_first:
            rosa.patch(peft_model, rosa.RosaConfig(rank=4))
        rosa.trainable_parameters(peft_model)
        stir(model)
        return peft_model

    torch.manual_seed(1)
    expected = train(make(), batch)
    torch.manual_seed(1)
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = train(model, batch)
    assert len(found) == 4 * 6 + 4 * 7 * 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
