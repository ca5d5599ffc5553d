"""Quantized bases, 8-bit and 4-bit, through bitsandbytes and torchao: RoSA trains on them, or says that it cannot."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, TrainingArguments

import rosa

FOUR_BIT = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
QUANTIZATIONS = {
    "bitsandbytes, 8-bit": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, nf4": BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, fp4 twice": BitsAndBytesConfig(
        **FOUR_BIT, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    "torchao, int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao, int4": TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao, float8": TorchAoConfig(Float8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def load(folder, make_model):
    """Loads the base in 16 bits, quantized."""
    if not any(folder.iterdir()):
        sizes = dict(hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)
        make_model(dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    return lambda quantization: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=copy.deepcopy(quantization), dtype=torch.bfloat16
    )


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request):
    return QUANTIZATIONS[request.param]


def patched(model, stir):
    return stir(rosa.patch(model, rosa.RosaConfig(rank=4)))


def pieces(tensor):
    """The plain tensors that hold a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach().clone()]
    return [piece for name in tensor.__tensor_flatten__()[0] for piece in pieces(getattr(tensor, name))]


def weights(model):
    return {name: pieces(p) for name, p in model.named_parameters() if "roae" not in name and "layernorm" not in name}


def train(model, batch, steps=20):
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2)
    optimizer = rosa.DynamicLayerSelection(adamw, model, interval=3)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    optimizer.unfreeze()
    return losses


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_training_saving_generating_and_back(load, quantization, batch, stir, tmp_path):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = load(quantization).train()
    with torch.enable_grad():
        logits = model(**batch).logits.detach()
    patched(model, stir)
    before = weights(model)
    losses = train(model, batch)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05
    after = weights(model)
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
    assert {p.dtype for p in rosa.trainable_parameters(model)} == {torch.float32}

    rosa.save_adapter(model, tmp_path)
    fresh = rosa.load_adapter(load(quantization), tmp_path)
    model.eval(), fresh.eval()
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(fresh.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    assert not torch.equal(rosa.unpatch(fresh).generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    assert torch.equal(rosa.unpatch(model).train()(**batch).logits, logits)


def test_evaluation_leaves_the_gradients_as_they_were(load, quantization, batch, stir):
    """bitsandbytes' 4-bit layers would pack their weights for a kernel without a backward."""
    model = patched(load(quantization), stir).train()
    before = gradients(model, batch)
    with torch.no_grad():
        model.eval()(**batch)
    after = gradients(model.train(), batch)
    assert all(gradient.norm() > 0 and torch.equal(after[name], gradient) for name, gradient in before.items())


@pytest.mark.parametrize("name", ["bitsandbytes, nf4", "torchao, int8"])
def test_rosa_trainer_takes_a_quantized_model(load, name, batch, stir, tmp_path):
    model = patched(load(QUANTIZATIONS[name]), stir)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=1e-2, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = [{name: value[0] for name, value in batch.items()}] * 8
    trainer = rosa.RosaTrainer(model, arguments, train_dataset=data, dls={"interval": 3})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05
    assert not model._hf_peft_config_loaded


@pytest.mark.parametrize("prepared", ["before", "after"])
def test_prepared_for_kbit_training(load, batch, prepared):
    model = load(QUANTIZATIONS["bitsandbytes, nf4"])
    if prepared == "before":
        prepare_model_for_kbit_training(model)
    rosa.patch(model, rosa.RosaConfig(rank=4)).train()
    if prepared == "after":  # it freezes all that it finds, RoSA's parameters too
        prepare_model_for_kbit_training(model)
        assert not any(p.requires_grad for p in model.parameters())
    losses = train(model, batch)
    assert model.is_gradient_checkpointing and sum(losses[-5:]) < sum(losses[:5]) - 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(load, quantization, batch, stir, reentrant):
    model = patched(load(quantization), stir).train()
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, batch)
    assert all((found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm() for name in expected)


@pytest.mark.parametrize("lora_first", [True, False])
def test_qlora_with_rosa(load, batch, lora_first):
    model = prepare_model_for_kbit_training(load(QUANTIZATIONS["bitsandbytes, nf4"]))
    if not lora_first:
        rosa.patch(model, rosa.RosaConfig(rank=4))
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    if lora_first:
        rosa.patch(model, rosa.RosaConfig(rank=4))
    rosa.trainable_parameters(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora" in name for name in before) and any("roae" in name for name in before)
    losses = train(model.train(), batch)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_layers_without_a_backward_are_refused(load):
    model = load(TorchAoConfig(Int8DynamicActivationInt8WeightConfig()))
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        rosa.UnsupportedModelError, match=r"q_proj of .* is a quantized Linear \(Int8Tensor.*no gradient"
    ):
        rosa.patch(model)
    assert not rosa.is_patched(model) and [p.requires_grad for p in model.parameters()] == flags


def test_a_4_bit_model_that_packed_its_weights_is_refused(load, batch):
    model = load(QUANTIZATIONS["bitsandbytes, nf4"]).eval()
    layer = model.model.layers[0].self_attn.q_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 alone")
    with torch.no_grad():
        model(**batch)
    with pytest.raises(rosa.UnsupportedModelError, match="load it anew and patch it before it generates"):
        rosa.patch(model)
    fresh = rosa.patch(load(QUANTIZATIONS["bitsandbytes, nf4"]))
    assert not fresh.model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu
    assert rosa.unpatch(fresh).model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu


def test_quantized_layers_are_not_merged(load, batch):
    for name, first in (("bitsandbytes, nf4", "uint8"), ("torchao, int8", "bfloat16")):
        model = rosa.patch(load(QUANTIZATIONS[name]), rosa.RoadConfig())
        before = weights(model)
        with pytest.raises(rosa.UnsupportedModelError, match=rf"layers.0.self_attn.q_proj is quantized .*{first}"):
            rosa.merge(model)
        assert model.model.layers[0].self_attn.q_proj.road is not None
        after = weights(model)
        assert all(torch.equal(a, b) for key in before for a, b in zip(before[key], after[key], strict=True))
