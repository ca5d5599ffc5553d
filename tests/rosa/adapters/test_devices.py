"""accelerate's hooks around a model: several devices, and layers that are offloaded to the CPU or to disk."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import rosa

OUTSIDE = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
LAST_LAYERS_ON_DISK = OUTSIDE | {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}


def dispatch(model, folder):
    return dispatch_model(model, LAST_LAYERS_ON_DISK, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADED = {
    "all on the CPU": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "all on disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "two layers on disk": dispatch,
}
IN_MEMORY = {
    "one device": lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "moved in at the first call": lambda model: cpu_offload_with_hook(model, execution_device="cpu")[0],
}


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def gradients(model, batch):
    model.train().zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)
def test_a_patched_model_that_is_offloaded_generates_and_does_not_train(make_patched, batch, tmp_path, offload):
    whole, model = make_patched().eval(), make_patched().eval()
    rosa.save_adapter(model, tmp_path / "adapter")
    offload(model, tmp_path)
    assert any(p.is_meta for name, p in model.named_parameters() if "roae" in name)
    assert torch.equal(logits(model, batch), logits(whole, batch))
    options = dict(attention_mask=batch["attention_mask"], max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(batch["input_ids"], **options), whole.generate(batch["input_ids"], **options))
    with pytest.raises(rosa.UnsupportedModelError, match=r"roae is offloaded to the CPU or to disk.*never train"):
        rosa.trainable_parameters(model)
    for call in (rosa.save_adapter, rosa.load_adapter):
        with pytest.raises(ValueError, match="Qwen2ForCausalLM is offloaded or on the meta device"):
            call(model, tmp_path / "adapter")
    with pytest.raises(rosa.UnsupportedModelError, match="roae is offloaded to the CPU or to disk"):
        rosa.DynamicLayerSelection(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert rosa.count_parameters(model) == rosa.count_parameters(whole)


@pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)], ids=["all linear layers", "queries alone"])
def test_road_of_an_offloaded_model_is_that_of_the_model_in_memory(make_model, batch, tmp_path, targets, offload):
    model = rosa.patch(make_model(initializer_range=0.3), rosa.RoadConfig(targets=targets)).eval()
    before = logits(model, batch)
    with torch.no_grad():
        for parameter in rosa.trainable_parameters(model):
            parameter += torch.linspace(-0.5, 0.5, len(parameter))
    expected = logits(model, batch)
    assert not torch.allclose(expected, before, atol=1e-2)
    offload(model, tmp_path)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(rosa.UnsupportedModelError, match="road is offloaded to the CPU or to disk"):
        rosa.trainable_parameters(model)


@pytest.mark.parametrize("train_norms", [True, False])
def test_adapters_of_an_offloaded_model_are_switched_where_they_train_no_norms(make_model, batch, train_norms):
    model = make_model().eval()
    seen = {"base": logits(model, batch)}
    for name in "ab":
        rosa.patch(model, rosa.RoadConfig(train_norms=train_norms), name)
        with torch.no_grad():
            for parameter in rosa.trainable_parameters(model):
                parameter += 0.1 * torch.randn_like(parameter)
        seen[name] = logits(model, batch)
    cpu_offload(model, execution_device="cpu")
    if train_norms:
        for change in (rosa.unpatch, lambda m: rosa.set_adapter(m, "a"), lambda m: rosa.disabled(m).__enter__()):
            with pytest.raises(ValueError, match=r"layernorm.weight is offloaded .*before the model is offloaded"):
                change(model)
        assert torch.equal(logits(model, batch), seen["b"])
    else:
        with pytest.raises(rosa.UnsupportedModelError, match="q_proj is offloaded .*adapters_by_row with a model in"):
            rosa.adapters_by_row(model, ["a", "b"]).__enter__()
        with rosa.disabled(model):
            assert torch.equal(logits(model, batch), seen["base"])
        rosa.set_adapter(model, "a")
        torch.testing.assert_close(logits(model, batch), seen["a"])
        assert torch.equal(logits(rosa.unpatch(model), batch), seen["base"])


@pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)
def test_an_offloaded_model_is_neither_patched_nor_loaded_into(make_model, make_patched, batch, tmp_path, offload):
    rosa.save_adapter(make_patched(), tmp_path / "adapter")
    model = make_model().eval()
    offload(model, tmp_path / "disk")
    expected = logits(model, batch)
    for change in (rosa.patch, lambda model: rosa.load_adapter(model, tmp_path / "adapter")):
        with pytest.raises(rosa.UnsupportedModelError, match="self_attn is offloaded .*load its adapter first"):
            change(model)
        assert not rosa.is_patched(model) and torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("hook", IN_MEMORY.values(), ids=IN_MEMORY)
@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_around_weights_in_memory_change_nothing(make_model, make_patched, stir, batch, hook, hooked_first):
    expected = gradients(make_patched(), batch)
    if hooked_first:
        hooked = make_model()
        hook(hooked)
        model = stir(rosa.patch(hooked, rosa.RosaConfig(rank=4)))
    else:
        model = make_patched()
        hook(model)
    found = gradients(model, batch)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_a_model_that_is_moved_while_it_is_disabled_has_its_adapter_there(make_patched, batch):
    model = make_patched(dtype=torch.bfloat16).eval()
    expected = logits(model, batch)
    with rosa.disabled(model):
        model.cuda()
    found = logits(model, {name: value.cuda() for name, value in batch.items()})
    torch.testing.assert_close(found.cpu(), expected, atol=0.02, rtol=0.02)
    assert {p.dtype for p in rosa.unpatch(model).parameters()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mapped_first", [True, False])
def test_a_model_over_two_gpus_trains_as_on_one(make_model, make_patched, stir, batch, tmp_path, mapped_first):
    device_map = dict.fromkeys(OUTSIDE, 0) | {f"model.layers.{i}": i // 2 for i in range(4)}
    one, batch = make_patched().to("cuda:0"), {name: value.to("cuda:0") for name, value in batch.items()}
    if mapped_first:
        make_model().save_pretrained(tmp_path)
        mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        two = stir(rosa.patch(mapped, rosa.RosaConfig(rank=4)))
    else:
        two = dispatch_model(make_patched(), device_map)
    assert {p.device.index for p in rosa.trainable_parameters(two)} == {0, 1}
    expected, found = gradients(one, batch), gradients(two, batch)
    assert all((found[name] - expected[name]).norm() < 1e-4 * expected[name].norm() for name in expected)
    adamw = torch.optim.AdamW(rosa.trainable_parameters(two), lr=1e-2)
    optimizer = rosa.DynamicLayerSelection(adamw, two, interval=1)
    optimizer.step()
    assert len(optimizer.scores) == 4
