"""Precision: bases in float32, bfloat16 and float16, with and without autocast and GradScaler; the adapter trains in
float32 and its steps do not vanish."""

import pytest
import torch
from transformers import TrainingArguments

import rosa

BASES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def names(value):
    return str(value).removeprefix("torch.")


def train(model, batch, *, steps, lr, autocast=None, scaler=None):
    """The losses of some steps, as torch's recipe for mixed precision has them."""
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=lr)
    optimizer = rosa.DynamicLayerSelection(adamw, model, interval=3)
    losses = []
    for _ in range(steps):
        with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(rosa.trainable_parameters(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    optimizer.unfreeze()
    return losses, optimizer


def make_scaler(device, autocast, base):
    """A GradScaler that grows soon; one that does nothing where no number is a float16."""
    enabled = torch.float16 in (autocast, base)
    return torch.amp.GradScaler(device, init_scale=256.0, growth_interval=10, enabled=enabled)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("family", ["qwen2", "gemma2"], indirect=True)
def test_training_lowers_the_loss_and_leaves_the_base_alone(family, make_model, batch, base, autocast, device):
    model = rosa.patch(make_model(family, dtype=base).to(device), rosa.RosaConfig(rank=4)).train()
    batch = {name: value.to(device) for name, value in batch.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in rosa.trainable_parameters(model)} == {torch.float32}
    scaler = make_scaler(device, autocast, base)
    losses, optimizer = train(model, batch, steps=30, lr=1e-2, autocast=autocast, scaler=scaler)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05 and len(optimizer.history) >= 9
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trainable
    assert all(after[name].dtype == before[name].dtype for name in before)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("base", BASES, ids=names)
def test_a_small_step_moves_every_parameter(make_patched, batch, base, autocast, device):
    model = make_patched(dtype=base, initializer_range=0.3).train().to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, batch, steps=1, lr=1e-5, autocast=autocast, scaler=make_scaler(device, autocast, base))
    for name, parameter in model.named_parameters():
        if name in before:
            moved = (parameter != before[name]).float().mean()
            assert moved > 0.9, f"{name}: {moved:.0%} of the values"


def test_a_norm_that_trains_keeps_the_dtype_of_what_it_is_given_by_name_too(make_patched):
    norm = make_patched(dtype=torch.bfloat16).model.layers[0].input_layernorm
    x = torch.ones(1, 2, 32, dtype=torch.bfloat16)
    assert norm(x).dtype == norm(hidden_states=x).dtype == torch.bfloat16 != norm.weight.dtype


def test_steps_whose_gradients_overflow_are_skipped_and_not_counted(make_patched, batch):
    model = make_patched(initializer_range=0.3).train()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-30)
    _, optimizer = train(model, batch, steps=1, lr=1e-2, autocast=torch.float16, scaler=scaler)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert optimizer.state_dict()["layer_selection"]["step"] == 0 and scaler.get_scale() == 2.0**30


@pytest.mark.parametrize("base", BASES, ids=names)
def test_trainer_with_bf16(make_model, batch, tmp_path, base):
    model = rosa.patch(make_model(dtype=base), rosa.RosaConfig(rank=4))
    data = [{name: value[0] for name, value in batch.items()}] * 8
    arguments = TrainingArguments(
        str(tmp_path), bf16=True, use_cpu=True, max_steps=20, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = rosa.RosaTrainer(model, arguments, train_dataset=data, dls={"interval": 3})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05
    assert {p.dtype for p in rosa.trainable_parameters(model)} == {torch.float32}
    assert model.lm_head.weight.dtype == base
