"""RoAd on linear layers: where it goes, what it leaves alone, and everything that a patched model does."""

import contextlib
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import rosa
from rosa.adapters.road import Pairing, Road
from rosa_kernels.road_reference import road_reference
from tests.rosa.conftest import make_model

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def stir_road(model):
    """Gives angles and scales values, as training would."""
    generator = torch.Generator().manual_seed(7)
    for parameter in rosa.trainable_parameters(model):
        with torch.no_grad():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def make_road(family="llama", *, config=None, **options):
    return stir_road(rosa.patch(make_model(family, **options), config or rosa.RoadConfig()))


def roads(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Road)}


def fused(model):
    return {name.split(".")[-2] for name, road in roads(model).items() if road.before_rope}


@pytest.mark.parametrize("variant, numbers", {1: 0.5, 2: 1, 4: 2}.items())
def test_a_model_has_the_numbers_of_its_variant_and_begins_as_it_was(batch, family, variant, numbers):
    model = make_model(family)
    before = model(**batch).logits
    rosa.patch(model, rosa.RoadConfig(variant=variant))
    assert torch.equal(model(**batch).logits, before)
    assert {name.split(".")[-2] for name in roads(model)} == LINEARS
    widths = sum(m.out_features for layer in model.model.layers for m in layer.modules() if hasattr(m, "out_features"))
    assert rosa.count_parameters(model)[0] == 2 * numbers * widths
    assert all(p.dtype == torch.float32 for p in rosa.trainable_parameters(model))


def test_names_of_the_base_stay_and_unpatch_is_exact(batch):
    model = make_model()
    names, before = list(model.state_dict()), model(**batch).logits
    flags = [p.requires_grad for p in model.parameters()]
    rosa.patch(model, rosa.RoadConfig(train_norms=True))
    new = [name for name in model.state_dict() if name not in names]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in new} == {"road"}
    assert [name for name in model.state_dict() if name not in new] == names
    stir_road(model)
    assert not torch.allclose(model(**batch).logits, before)
    rosa.unpatch(model)
    assert list(model.state_dict()) == names and torch.equal(model(**batch).logits, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("pairing", ["neighbours", "half", "rope", 4])
@pytest.mark.parametrize("variant", [1, 2, 4])
def test_rope_in_the_same_op_changes_nothing(batch, variant, pairing):
    model = make_road(config=rosa.RoadConfig(variant=variant, pairing=pairing))
    assert fused(model) == {"q_proj", "k_proj"}
    together = model(**batch).logits
    for layer in model.model.layers:
        del layer.self_attn.rope_road
        layer.self_attn.rope_road = None
    for road in roads(model).values():
        road.joined = False
    torch.testing.assert_close(model(**batch).logits, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family, sources", {"llama": LINEARS & {"q_proj", "k_proj"}, "qwen3": set()}.items())
def test_rope_is_in_the_same_op_where_nothing_stands_between(family, sources):
    assert fused(make_road(family)) == sources


def test_one_of_queries_and_keys_goes_with_rope_alone(batch):
    config = rosa.RoadConfig(targets=("q_proj", "v_proj"))
    model = make_road(config=config)
    assert fused(model) == {"q_proj"} and {n.split(".")[-2] for n in roads(model)} == {"q_proj", "v_proj"}
    ours = model(**batch).logits
    with rosa.disabled(model):
        hooks = [
            model.get_submodule(name.removesuffix(".road")).register_forward_hook(
                lambda m, args, out, road=road: road_reference(out, road.theta, road.alpha, **road.options)
            )
            for name, road in roads_of(model).items()
        ]
        torch.testing.assert_close(model(**batch).logits, ours, atol=1e-5, rtol=1e-5)
        for hook in hooks:
            hook.remove()


def roads_of(model):
    """The RoAd modules of the active adapter, in the model or not."""
    modules = model._rosa.active_adapter.modules
    return {f"{name}.road": module for name, module in modules.items() if isinstance(module, Road)}


def test_rope_pairs_are_the_models_own():
    model = make_road(config=rosa.RoadConfig(pairing="rope"))
    pairings = {name.split(".")[-2]: road.pairing for name, road in roads(model).items()}
    assert pairings == dict.fromkeys(LINEARS, Pairing(2)) | {"q_proj": Pairing(16), "k_proj": Pairing(16)}


@pytest.mark.parametrize("variant, commutes", {1: True, 2: False, 4: False}.items())
def test_road_1_with_ropes_pairs_is_a_scale_and_a_phase_and_may_come_after_rope(variant, commutes):
    model = make_road(config=rosa.RoadConfig(variant=variant, pairing="rope"))
    attention = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    cos, sin = model.model.rotary_emb(q, torch.arange(9)[None])
    before, _ = attention.rope_road(q, k, cos, sin, None)
    q, _ = apply_rotary_pos_emb(q, k, cos, sin)
    after = attention.q_proj.road(q.transpose(1, 2).flatten(2)).unflatten(-1, (4, 16)).transpose(1, 2)
    assert torch.allclose(before, after, atol=1e-5) == commutes


def test_layers_and_targets_choose():
    model = make_road(config=rosa.RoadConfig(targets=["down_proj", "self_attn.o_proj"], layers=(1, 3)))
    assert {name.removeprefix("model.layers.").removesuffix(".road") for name in roads(model)} == {
        f"{i}.{name}" for i in (1, 3) for name in ("mlp.down_proj", "self_attn.o_proj")
    }


def test_gpt_2s_transposed_layers_and_models_without_rope():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    ids = torch.randint(3, 90, (2, 9))
    before = model(ids).logits
    rosa.patch(model, rosa.RoadConfig())
    assert {name.split(".")[-2] for name in roads(model)} == {"c_attn", "c_proj", "c_fc"}
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(stir_road(model)(ids).logits, before)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_it_is_saved_and_loaded(batch, tmp_path, variant):
    config = rosa.RoadConfig(variant=variant, pairing="rope", targets=("q_proj", "down_proj"), train_norms=True)
    model = make_road(config=config)
    rosa.save_adapter(model, tmp_path)
    fresh = make_model("llama")
    rosa.load_adapter(fresh, tmp_path, "loaded")
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert fresh._rosa.active_adapter.config == config
    with pytest.raises(rosa.AdapterError, match="another base"):
        rosa.load_adapter(make_model("llama", num_hidden_layers=3), tmp_path)
    with pytest.raises(rosa.AdapterError, match="do not fit"):
        rosa.load_adapter(make_model("llama", intermediate_size=64, hidden_size=48), tmp_path)


def test_rosa_and_road_in_one_model_by_name(batch, tmp_path, stir):
    model = make_model("llama")
    base = model(**batch).logits
    stir(rosa.patch(model, rosa.RosaConfig(rank=4), "rosa"))
    of_rosa = model(**batch).logits
    stir_road(rosa.patch(model, rosa.RoadConfig(), "road"))
    of_road = model(**batch).logits
    assert len({of_rosa.sum().item(), of_road.sum().item(), base.sum().item()}) == 3
    for name, logits in (("rosa", of_rosa), ("road", of_road)) * 2:
        rosa.set_adapter(model, name)
        assert torch.equal(model(**batch).logits, logits)
        with rosa.disabled(model):
            assert torch.equal(model(**batch).logits, base)
        rosa.save_adapter(model, tmp_path / name)
    fresh = make_model("llama")
    for name, logits in (("road", of_road), ("rosa", of_rosa)):
        rosa.load_adapter(fresh, tmp_path / name, name)
        assert torch.equal(fresh(**batch).logits, logits)
    twin = copy.deepcopy(model)
    rosa.delete_adapter(model, "rosa")
    rosa.unpatch(model)
    assert torch.equal(model(**batch).logits, base)
    assert torch.equal(twin(**batch).logits, of_road)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same_gradients(batch, reentrant):
    model = make_road()

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in rosa.trainable_parameters(model)]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for mine, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_compiled_model_sees_switches_and_has_the_same_gradients(batch):
    model = make_road(num_hidden_layers=2)
    parameters = rosa.trainable_parameters(model)
    expected = torch.autograd.grad(model(**batch).loss, parameters)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(torch.autograd.grad(compiled(**batch).loss, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    with rosa.disabled(model):
        base = compiled(**batch).logits
    rosa.unpatch(model)
    torch.testing.assert_close(model(**batch).logits, base)


def test_layer_selection_ranks_by_the_adapter(batch):
    model = make_road()
    parameters = rosa.trainable_parameters(model)
    optimizer = rosa.DynamicLayerSelection(
        torch.optim.AdamW(parameters, lr=1e-2), model, interval=1, p_exploit=1.0, score="adapter"
    )
    before = [p.detach().clone() for p in parameters]
    model(**batch).loss.backward()
    optimizer.step()
    moved = {
        int(name.split(".")[2])
        for (name, p), was in zip(model._rosa.active_adapter.parameters().items(), before, strict=True)
        if not torch.equal(p, was)
    }
    assert moved == set(optimizer.selected_layers) and len(moved) == 2


@pytest.mark.parametrize("kind", [dict(load_in_8bit=True), dict(load_in_4bit=True)])
def test_on_a_quantized_base_it_trains(batch, tmp_path, kind):
    sizes = dict(hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)
    make_model("llama", dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**kind), dtype=torch.bfloat16
    )
    before = model(**batch).logits
    rosa.patch(model, rosa.RoadConfig())
    torch.testing.assert_close(model(**batch).logits, before, atol=0.02, rtol=0.02)
    optimizer = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rosa.trainable_parameters(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


BAD = {
    "unknown target": (
        "llama", dict(targets=("q_proj", "query")),
        "targets names 'query', which there is none of: the linear layers in the decoder layers of this "
        "LlamaForCausalLM are down_proj, gate_proj, k_proj",
    ),
    "output layer": ("llama", dict(targets=("lm_head",)), "lm_head is outside of the decoder layers"),
    "embeddings": ("llama", dict(targets=("embed_tokens",)), "model.embed_tokens is outside of the decoder layers"),
    "a norm": ("llama", dict(targets=("input_layernorm",)), "input_layernorm is no linear layer"),
    "a group that does not divide": (
        "llama", dict(pairing=20), "layers.0.self_attn.q_proj cannot be paired by pairing=20: its 64 outputs are no",
    ),
    "behind a norm": ("qwen3", dict(pairing="rope"), 'there is more between, such as a norm.*use pairing="neighbours"'),
    "no queries or keys": ("llama", dict(pairing="rope", targets=("v_proj",)), "which none of the targets makes"),
    "a layer that is not there": ("llama", dict(layers=(7,)), "layers names layer 7, but LlamaForCausalLM has 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(batch, case):
    family, fields, message = BAD[case]
    model = make_model(family)
    names, before = list(model.state_dict()), model(**batch).logits
    with pytest.raises(ValueError, match=message):
        rosa.patch(model, rosa.RoadConfig(**fields))
    assert not rosa.is_patched(model) and list(model.state_dict()) == names
    assert torch.equal(model(**batch).logits, before) and all(p.requires_grad for p in model.parameters())


def test_rope_pairs_where_nothing_rotates_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    for pairing in ("rope", "half"):
        with pytest.raises(ValueError, match=f"pairing='{pairing}' follows the heads .*use pairing=\"neighbours\""):
            rosa.patch(model, rosa.RoadConfig(pairing=pairing))


def test_odd_outputs_are_left_out_unless_they_are_named():
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=33, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="mlp.up_proj cannot be paired.* it has 33 outputs, an odd number"):
        rosa.patch(model, rosa.RoadConfig(targets=("up_proj",)))
    rosa.patch(model, rosa.RoadConfig())
    assert {name.split(".")[-2] for name in roads(model)} == LINEARS - {"gate_proj", "up_proj"}


def test_the_wrong_kind_of_configuration_is_refused(make_model):
    with pytest.raises(TypeError, match="config must be a rosa.RosaConfig or a rosa.RoadConfig, got dict"):
        rosa.patch(make_model(), {"variant": 2})


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_the_kernels_compute_what_the_reference_does(batch, variant, kernel_device, monkeypatch):
    """Forward, every gradient, and decoding, where outputs may be written in place."""
    config = rosa.RoadConfig(variant=variant)
    model = make_road(config=config, num_hidden_layers=2).to(kernel_device)
    batch = {name: tensor.to(kernel_device) for name, tensor in batch.items()}
    parameters = rosa.trainable_parameters(model)

    def results():
        out = model(**batch)
        tokens = model.generate(batch["input_ids"][:, -4:], max_new_tokens=3, do_sample=False)
        return out.logits, tokens, torch.autograd.grad(out.loss, parameters)

    monkeypatch.setenv("ROSA_BACKEND", "reference")
    logits, tokens, gradients = results()
    monkeypatch.setenv("ROSA_BACKEND", "triton")
    found = results()
    torch.testing.assert_close(found[0], logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1], tokens)
    for mine, theirs in zip(found[2], gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("by_row", [False, True])
def test_what_other_hooks_see_is_not_overwritten(make_model, monkeypatch, by_row):
    monkeypatch.setenv("ROSA_BACKEND", "triton")
    model = make_model("llama", num_hidden_layers=1).eval()
    linear, seen = model.model.layers[0].mlp.up_proj, {}
    linear.register_forward_hook(lambda module, args, output: seen.update(before=output, was=output.clone()))
    rosa.patch(model, rosa.RoadConfig(targets=("up_proj",)))
    torch.nn.init.normal_(linear.road.theta)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), rosa.adapters_by_row(model, ["default"]) if by_row else contextlib.nullcontext():
        linear.road.register_forward_hook(lambda module, args, output: seen.update(given=args[0], made=output))
        model(ids)
    assert torch.equal(seen["before"], seen["was"]) and torch.equal(seen["given"], seen["was"])
    assert not torch.equal(seen["made"], seen["was"])
