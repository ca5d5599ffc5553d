"""`merge` and `unmerge`: what a merged model computes, what can be done with it, and what is refused."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainingArguments

import rosa
from tests.rosa.families import make_model as make_family


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def stirred(model, size=0.3, **config):
    """The model with RoAd's angles and scales, and the norms where they train, at values as after training."""
    rosa.patch(model, rosa.RoadConfig(**config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in rosa.trainable_parameters(model):
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


class Operations(TorchDispatchMode):
    """Notes the operations that run in the block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.names = []
        return super().__enter__()


def operations(model, batch):
    with Operations() as noted:
        logits(model, batch)
    return noted.names


@pytest.mark.parametrize("pairing", ["neighbours", "half", "rope", 4])
@pytest.mark.parametrize("variant", [1, 2, 4])
def test_a_merged_model_computes_what_the_adapted_one_does(make_model, batch, variant, pairing):
    model = make_model("qwen2")  # with biases
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    before, of_base = logits(model, batch), state(model)
    stirred(model, variant=variant, pairing=pairing, train_norms=True)
    adapted, of_adapted = logits(model, batch), state(model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert rosa.merge(model) is model
    torch.testing.assert_close(logits(model, batch), adapted, atol=1e-5, rtol=1e-5)
    assert rosa.unmerge(model) is model
    assert_equal_states(state(model), of_adapted)
    assert torch.equal(logits(model, batch), adapted)
    rosa.merge(model)
    rosa.unpatch(model)
    assert_equal_states(state(model), of_base)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "mixtral", "gemma2", "falcon"])
def test_transposed_fused_routed_and_families_own_layers_merge_too(family, batch):
    model = make_family(family)
    before = logits(model, batch)
    adapted = logits(stirred(model), batch)
    assert not torch.allclose(adapted, before, atol=1e-2)
    torch.testing.assert_close(logits(rosa.merge(model), batch), adapted, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(rosa.unmerge(model), batch), adapted)
    assert torch.equal(logits(rosa.unpatch(model), batch), before)


def test_a_merged_model_runs_the_operations_of_its_base_and_trains_nothing(make_model, batch):
    model = make_model("llama")
    names, plain = [*model.state_dict()], operations(model, batch)
    stirred(model, pairing="rope", train_norms=True)
    assert len(operations(model, batch)) > len(plain)
    rosa.merge(model)
    assert operations(model, batch) == plain
    assert [*model.state_dict()] == names
    assert rosa.count_parameters(model)[0] == 0 and not any(p.requires_grad for p in model.parameters())


def test_each_weight_is_rounded_once(make_model):
    model = stirred(make_model("llama", dtype=torch.bfloat16))
    exact = copy.deepcopy(model).double()
    rosa.merge(model), rosa.merge(exact)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact.state_dict()[name].to(torch.bfloat16)), name


def test_merged_in_16_bits_it_is_as_near_to_float64_as_it_was(make_model, batch):
    def errors(seed):
        model = stirred(make_model("llama", dtype=torch.bfloat16, seed=seed), 0.1, train_norms=True)
        exact = logits(copy.deepcopy(model).double(), batch)
        adapted = logits(model, batch)
        return [(out - exact).square().mean().sqrt() for out in (adapted, logits(rosa.merge(model), batch))]

    adapted, merged = torch.tensor([errors(seed) for seed in range(4)]).mean(0)
    assert 0 < merged < 1.5 * adapted


def test_a_merged_model_generates_as_before(make_model, batch):
    model = stirred(make_model("llama"))
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    adapted = model.eval().generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(rosa.merge(model).generate(**prompt, max_new_tokens=8, do_sample=False), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_as_a_model_like_any_other(make_model, batch, tmp_path, dtype):
    make_model("qwen2", dtype=dtype).save_pretrained(tmp_path / "base")
    model = stirred(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), train_norms=True)
    rosa.merge(model).save_pretrained(tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not rosa.is_patched(loaded) and loaded.dtype == dtype
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118


def test_its_adapter_is_saved_as_it_is_unmerged(make_model, tmp_path):
    model = stirred(make_model("qwen2", dtype=torch.bfloat16), train_norms=True)
    rosa.save_adapter(model, tmp_path / "before")
    rosa.save_adapter(rosa.merge(model), tmp_path / "merged")
    for name in ("adapter_model.safetensors", "rosa_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_it_can_be_trained_on_once_it_is_unmerged(make_model, batch):
    def train(model, merges):
        optimizer = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2)
        losses = []
        for _ in range(3):
            loss = model(**batch).loss
            loss.backward()
            if merges:  # gradients wait
                rosa.merge(model), rosa.unmerge(model)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    config = dict(train_norms=True)
    assert train(stirred(make_model(), **config), True) == train(stirred(make_model(), **config), False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_merged_model_is_merged_for_itself(make_model, batch, way):
    model = stirred(make_model("llama"), train_norms=True)
    adapted = logits(model, batch)
    merged = logits(rosa.merge(model), batch)
    other = way(model)
    assert torch.equal(logits(rosa.unmerge(other), batch), adapted)
    assert torch.equal(logits(model, batch), merged)
    with pytest.raises(ValueError, match="is merged into the weights"):
        rosa.trainable_parameters(model)


def test_unmerging_follows_the_model_into_another_dtype(make_model, batch):
    model = make_model("llama")
    base = state(model)
    rosa.merge(stirred(model, train_norms=True)).bfloat16()
    logits(rosa.unmerge(model), batch)
    assert all(
        torch.equal(tensor, base[name].bfloat16())
        for name, tensor in model.state_dict().items()
        if "norm" not in name and ".road." not in name
    )
    assert_equal_states(state(rosa.unpatch(model)), {name: tensor.bfloat16() for name, tensor in base.items()})


def test_norms_of_a_model_that_was_cast_up_are_merged_as_they_were_trained(make_model):
    model = stirred(make_model("llama", dtype=torch.bfloat16), train_norms=True).float()
    trained = {name: tensor for name, tensor in state(model).items() if "norm" in name}
    rosa.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.items())


def test_merging_inside_inference_mode_leaves_a_model_that_trains(make_model, batch):
    model = stirred(make_model("llama"), train_norms=True)
    with torch.inference_mode():
        rosa.merge(model)
    assert not any(p.is_inference() for p in model.parameters())
    rosa.unmerge(model)(**batch).loss.backward()
    assert all(p.grad is not None for p in rosa.trainable_parameters(model))


def test_layers_of_which_an_adapter_has_a_few(make_model, batch):
    model = make_model("llama")
    before = state(model)
    adapted = logits(stirred(model, targets=("q_proj", "up_proj"), layers=(1, 3)), batch)
    merged = state(rosa.merge(model))
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {
        f"model.layers.{i}.{name}.weight" for i in (1, 3) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    torch.testing.assert_close(logits(model, batch), adapted, atol=1e-5, rtol=1e-5)


WHILE_MERGED = {
    "merge": rosa.merge,
    "train": rosa.trainable_parameters,
    "set_adapter": lambda model: rosa.set_adapter(model, "other"),
    "the same adapter": lambda model: rosa.set_adapter(model, "default"),
    "patch": lambda model: rosa.patch(model, rosa.RosaConfig(rank=4), "third"),
    "disabled": lambda model: rosa.disabled(model).__enter__(),
}


@pytest.fixture
def merged(make_model):
    """A merged model that has another adapter too."""
    model = stirred(make_model("llama"), train_norms=True)
    rosa.patch(model, rosa.RosaConfig(rank=4), "other")
    rosa.set_adapter(model, "default")
    return rosa.merge(model)


@pytest.mark.parametrize("what", WHILE_MERGED)
def test_while_merged_nothing_is_trained_switched_or_added(merged, batch, what):
    before, computed = state(merged), logits(merged, batch)
    with pytest.raises(
        ValueError, match=r"'default' is merged into the weights of this LlamaForCausalLM: call rosa.unmerge\(model\)"
    ):
        WHILE_MERGED[what](merged)
    assert_equal_states(state(merged), before)
    assert torch.equal(logits(merged, batch), computed)
    assert rosa.adapter_names(merged) == ["default", "other"] and rosa.active_adapter(merged) == "default"


def test_while_merged_no_adapter_is_loaded(merged, make_model, batch, tmp_path):
    rosa.save_adapter(stirred(make_model("llama"), 0.1, train_norms=True), tmp_path)
    computed = logits(merged, batch)
    for name in ("default", "other", "new"):
        with pytest.raises(ValueError, match="'default' is merged into the weights|has RosaConfig.*another adapter"):
            rosa.load_adapter(merged, tmp_path, name)
    rosa.delete_adapter(merged, "other")
    with pytest.raises(ValueError, match="'default' is active"):
        rosa.delete_adapter(merged, "default")
    assert torch.equal(logits(merged, batch), computed)
    rosa.load_adapter(rosa.unmerge(merged), tmp_path)
    assert not torch.allclose(logits(merged, batch), computed)


def test_trainers_and_optimizers_do_not_train_a_merged_model(make_model, batch, tmp_path):
    model = stirred(make_model("llama"), train_norms=True)
    optimizer = rosa.DynamicLayerSelection(torch.optim.SGD(rosa.trainable_parameters(model), lr=1.0), model, interval=2)
    model(**batch).loss.backward()
    rosa.merge(model)
    before = state(model)
    with pytest.raises(RuntimeError, match="for an adapter that is not in the model now"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(**batch).loss.backward()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    trainer = rosa.RosaTrainer(model, arguments, dls=None, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="is merged into the weights"):
        trainer.train()
    assert_equal_states(state(model), before)


def refused(model, batch, error, match):
    """`merge` says why it does not, and changes nothing."""
    before, computed = state(model), logits(model, batch)
    with pytest.raises(error, match=match):
        rosa.merge(model)
    assert_equal_states(state(model), before)
    assert torch.equal(logits(model, batch), computed)


def test_rosa_says_why_it_is_not_merged(make_patched, batch):
    refused(
        make_patched(), batch, ValueError, "'default' is RoSA's.*depends on the input.*The norms that it trained can"
    )


def test_what_is_not_patched_disabled_or_not_merged_is_refused(make_model):
    model = make_model()
    for call in (rosa.merge, rosa.unmerge):
        with pytest.raises(ValueError, match="is not patched"):
            call(model)
    rosa.patch(model, rosa.RoadConfig())
    with pytest.raises(ValueError, match="no adapter is merged into this Qwen2ForCausalLM"):
        rosa.unmerge(model)
    with rosa.disabled(model), pytest.raises(ValueError, match="inside `with rosa.disabled"):
        rosa.merge(model)
    with rosa.disabled(model), pytest.raises(ValueError, match="no adapter is merged"):
        rosa.unmerge(model)


SINGULAR = {
    # variant, row of theta and alpha, values
    "no scale": (1, "alpha", [0], 0.0),
    "two rows along one line": (2, "theta", [1], torch.pi / 2),
    "not finite": (4, "theta", [3], float("nan")),
}


@pytest.mark.parametrize("case", SINGULAR)
def test_singular_blocks_are_refused_by_name(make_model, batch, case):
    variant, weight, at, value = SINGULAR[case]
    model = rosa.patch(make_model("llama"), rosa.RoadConfig(variant=variant))
    with torch.no_grad():
        getattr(model.model.layers[2].mlp.up_proj.road, weight)[at] = value
    with pytest.raises(
        ValueError, match=r"2.mlp.up_proj cannot be merged: the block of outputs (0 and 1|2 and 3) is singular"
    ):
        rosa.merge(model)
    assert model.model.layers[2].mlp.up_proj.road is not None and not model._rosa.kept


def test_what_overflows_is_refused(make_model, batch):
    model = rosa.patch(make_model("llama", dtype=torch.float16), rosa.RoadConfig())
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.road.alpha *= 1e7
    refused_by = r"layers.1.self_attn.v_proj.weight would hold values that are not finite in torch.float16"
    before = state(model)
    with pytest.raises(ValueError, match=refused_by):
        rosa.merge(model)
    assert_equal_states(state(model), before)


def test_a_layer_that_peft_has_wrapped_is_refused_by_name(make_model, batch):
    model = make_model("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]))
    stirred(model)
    refused(model, batch, rosa.UnsupportedModelError, r"layers.0.self_attn.v_proj is a peft.tuners.lora.layer.Linear")
    rosa.unpatch(model)
    stirred(model, targets=("q_proj",))
    adapted = logits(model, batch)
    torch.testing.assert_close(logits(rosa.merge(model), batch), adapted, atol=1e-5, rtol=1e-5)


def lora(*targets):
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


def test_a_layer_that_peft_has_wrapped_is_merged_as_the_message_says(make_model, batch, tmp_path):
    peft_model = get_peft_model(make_model("llama"), lora("q_proj", "down_proj"))
    adapted = logits(stirred(peft_model), batch)
    message = r"q_proj is a peft.*rosa.save_adapter, call rosa.unpatch\(model\), take that off .*load the adapter again"
    refused(peft_model, batch, rosa.UnsupportedModelError, message)
    rosa.save_adapter(peft_model, tmp_path)
    model = rosa.unpatch(peft_model).merge_and_unload()
    rosa.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(rosa.merge(model), batch), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["q_proj", "k_proj"])
def test_where_rope_turns_lora_that_was_put_around_since_it_is_refused_by_name(make_model, batch, target):
    peft_model = get_peft_model(stirred(make_model("llama")), lora(target))
    message = rf"layers.0.self_attn.{target} was wrapped since it has RoAd.*leave the adapter beside"
    refused(peft_model, batch, rosa.UnsupportedModelError, message)


def test_where_roads_adapt_the_output_beneath_lora_they_are_merged(make_model, batch):
    peft_model = get_peft_model(stirred(make_model("llama")), lora("v_proj", "down_proj"))
    adapted = logits(peft_model, batch)
    torch.testing.assert_close(logits(rosa.merge(peft_model), batch), adapted, atol=1e-5, rtol=1e-5)
    peft_model = get_peft_model(stirred(make_model("qwen3")), lora("q_proj"))  # whose queries are normed first
    adapted = logits(peft_model, batch)
    torch.testing.assert_close(logits(rosa.merge(peft_model), batch), adapted, atol=1e-5, rtol=1e-5)


def test_a_familys_own_layer_that_computes_more_is_refused_by_name(make_model, batch):
    class Scaled(torch.nn.Linear):
        __module__ = "transformers.models.llama.modeling_llama"

        def forward(self, x):
            return 2 * super().forward(x)

    model = make_model("llama")
    model.model.layers[1].mlp.up_proj = Scaled(32, 48, bias=False)
    message = r"layers.1.mlp.up_proj is a transformers\.models\.llama.*Scaled, and what that computes is more than"
    refused(stirred(model), batch, rosa.UnsupportedModelError, message)


def test_shared_weights_are_refused_by_name(make_model, batch):
    model = make_model("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.gate_proj.weight
    stirred(model)
    message = "layers.0.mlp.gate_proj.weight belongs to model.layers.1.mlp.up_proj too"
    refused(model, batch, rosa.UnsupportedModelError, message)


def test_models_without_values_are_refused(make_model):
    with torch.device("meta"):
        model = rosa.patch(make_model("llama"), rosa.RoadConfig())
    with pytest.raises(rosa.UnsupportedModelError, match="layers.0.self_attn.q_proj has no values here"):
        rosa.merge(model)


def test_a_model_that_was_offloaded_since_is_not_unmerged_before_it_is_back(make_model, batch, tmp_path):
    from accelerate import disk_offload

    model = stirred(make_model("llama"))
    merged = logits(rosa.merge(model), batch)
    disk_offload(model, tmp_path, execution_device="cpu")
    for call in (rosa.unmerge, rosa.unpatch):
        with pytest.raises(ValueError, match="was offloaded since the adapter 'default' was merged"):
            call(model)
    assert torch.equal(logits(model, batch), merged)
    with pytest.raises(ValueError, match="is merged into the weights"):
        rosa.merge(model)
