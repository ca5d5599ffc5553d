"""Several adapters on one model: switched, deleted and disabled, each time bitwise the model that it should be."""

import contextlib
import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import rosa

CONFIGS = {
    "wide": rosa.RosaConfig(rank=4, r_low=0.5),
    "upper": rosa.RosaConfig(rank=2, layers=(2, 3), alpha=0.3),
    "frozen-norms": rosa.RosaConfig(rank=3, train_norms=False, layers=(0, 3)),
    "double": rosa.RosaConfig(rank=4, adapter_dtype="float64"),
}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def stirred(model, seed):
    """The model with other values in everything that its active adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rosa.trainable_parameters(model):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def fingerprint(model):
    """All that the base consists of: values, dtypes, flags, gradients, modules, hooks and attributes."""
    return (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: (p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()},
        sorted(model.__dict__),
    )


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def crowd(make_model, batch, dtype):
    """A model with all the adapters, the logits of each, and the base's."""
    model = make_model(dtype=dtype).eval()
    seen = {"base": logits(model, batch)}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        rosa.patch(model, config, name)
        seen[f"new {name}"] = logits(model, batch)
        seen[name] = logits(stirred(model, seed), batch)
    return model, seen


def test_a_second_adapter_begins_at_the_base_and_is_active(crowd):
    model, seen = crowd
    assert rosa.adapter_names(model) == list(CONFIGS) and rosa.active_adapter(model) == "double"
    for name in CONFIGS:
        torch.testing.assert_close(seen[f"new {name}"], seen["base"], rtol=0.02, atol=3e-3)
    assert len({tuple(seen[name].float().flatten().tolist()) for name in ("base", *CONFIGS)}) == 5


def test_every_switch_gives_bitwise_the_adapter_and_disabled_bitwise_the_base(crowd, batch):
    model, seen = crowd
    for name in ("wide", "double", "upper", "frozen-norms", "wide", "frozen-norms", "upper", "upper", "double"):
        rosa.set_adapter(model, name)
        assert rosa.active_adapter(model) == name
        assert torch.equal(logits(model, batch), seen[name])
        with rosa.disabled(model) as base:
            assert base is model and torch.equal(logits(model, batch), seen["base"])
            assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(logits(model, batch), seen[name])


@pytest.mark.parametrize("last", CONFIGS)
def test_unpatch_is_exact_from_any_adapter(make_model, batch, dtype, last):
    model = make_model(dtype=dtype).eval()
    model.lm_head.weight.requires_grad_(False)
    before = fingerprint(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        stirred(rosa.patch(model, config, name), seed)
    rosa.set_adapter(model, last)
    model(**batch).loss.backward()
    for name in set(CONFIGS) - {last}:
        rosa.delete_adapter(model, name)
    assert rosa.adapter_names(model) == [last]
    assert same(fingerprint(rosa.unpatch(model)), before)


CASTS = [(torch.float32, torch.bfloat16), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("family", ["llama", "phi"], ids=["rms-norm", "layer-norm"])
@pytest.mark.parametrize(("before", "dtype"), CASTS, ids=["bfloat16", "float64", "from bfloat16"])
@pytest.mark.parametrize("disabled", [False, True])
def test_a_model_that_is_cast_with_adapters_goes_on_as_one_of_that_dtype(batch, family, before, dtype, disabled):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=96)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).to(before).eval()
    plain = copy.deepcopy(model).to(dtype)
    seen = {}
    for seed, name in enumerate(("resting", "active")):
        seen[name] = logits(stirred(rosa.patch(model, rosa.RosaConfig(rank=4, r_low=0.5), name), seed), batch)
    with rosa.disabled(model) if disabled else contextlib.nullcontext():
        model.to(dtype)
    for name in ("active", "resting"):
        rosa.set_adapter(model, name)
        assert logits(model, batch).dtype == dtype
        torch.testing.assert_close(logits(model, batch), seen[name].to(dtype), atol=0.05, rtol=0.05)
        with rosa.disabled(model):
            torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=0.02, rtol=0.02)
    rosa.unpatch(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model, batch), logits(plain, batch))


def test_only_the_active_adapter_trains_is_counted_and_stands_in_the_model(make_model):
    model = rosa.patch(make_model(), CONFIGS["wide"], "wide")
    counted, names = rosa.count_parameters(model), [name for name, _ in model.named_parameters()]
    rosa.patch(model, CONFIGS["frozen-norms"], "frozen-norms")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{i}.self_attn.roae.{w}" for i in (0, 3) for w in ("down", "up", "gqa_down", "gqa_up")
    }
    rosa.set_adapter(model, "wide")
    assert rosa.count_parameters(model) == counted and [name for name, _ in model.named_parameters()] == names


def test_an_optimizer_goes_on_after_a_visit_to_another_adapter_as_if_there_had_been_none(make_model, batch, dtype):
    def train(visits):
        model = rosa.patch(make_model(dtype=dtype), CONFIGS["wide"], "a").train()
        optimizer = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2)
        for step in range(4):
            if visits and step == 2:
                rosa.patch(model, CONFIGS["upper"], "b")
            if visits and step == 2:
                model(**batch).loss.backward()  # these gradients stay with the second adapter
                rosa.set_adapter(model, "a")
            model(**batch).loss.backward()
            if visits and step >= 2:  # between backward and step
                rosa.set_adapter(model, "b")
                stirred(model, 3)
                rosa.set_adapter(model, "a")
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in model.named_parameters()}

    alone, visited = train(False), train(True)
    assert alone.keys() == visited.keys() and all(torch.equal(alone[name], visited[name]) for name in alone)


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient(make_patched, batch, dtype):
    def gradients(reference):
        model = make_patched(dtype=dtype).train()
        loss = model(**batch).loss
        if reference:
            with rosa.disabled(model), torch.no_grad():
                model(**batch)
        loss.backward()
        return [p.grad for p in rosa.trainable_parameters(model)]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, theirs)


def test_disabled_may_be_nested_and_ends_with_an_exception(make_model, make_patched, batch):
    model, base = make_patched().eval(), make_model().eval()
    model.model.layers[1].input_layernorm.weight.requires_grad_(False)  # as layer selection leaves it
    model(**batch).loss.backward()
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    ours, theirs = logits(model, batch), logits(base, batch)
    with pytest.raises(RuntimeError, match="inside"), rosa.disabled(model):
        with rosa.disabled(model):
            assert torch.equal(logits(model, batch), theirs)
        assert torch.equal(logits(model, batch), theirs)
        assert {name for name, _ in model.named_parameters()} == {name for name, _ in base.named_parameters()}
        raise RuntimeError("inside")
    assert torch.equal(logits(model, batch), ours)
    after = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert after.keys() == flags.keys() and all(
        after[n][0] == flags[n][0] and after[n][1] is flags[n][1] for n in flags
    )


def test_what_cannot_be_done_is_refused_and_changes_nothing(make_model, make_patched, batch, tmp_path):
    model = make_patched().eval()
    rosa.save_adapter(model, tmp_path)
    rosa.patch(model, CONFIGS["upper"], "second")
    before, ours = fingerprint(model), logits(model, batch)
    refused = [
        (
            ValueError,
            "patched already; .*another adapter_name than 'second'",
            lambda: rosa.patch(model, None, "second"),
        ),
        (ValueError, r"adapter_name must be .*'a/b'", lambda: rosa.patch(model, None, "a/b")),
        (ValueError, r"adapter_name must be .*''", lambda: rosa.load_adapter(model, tmp_path, "")),
        (ValueError, r"adapter_name must be .*3", lambda: rosa.patch(model, None, 3)),
        (ValueError, "layers names layer 9", lambda: rosa.patch(model, rosa.RosaConfig(layers=(9,)), "third")),
        (KeyError, "no adapter 'third'; it has default, second", lambda: rosa.set_adapter(model, "third")),
        (KeyError, "no adapter 'third'", lambda: rosa.delete_adapter(model, "third")),
        (KeyError, "no adapter 'third'", lambda: rosa.save_adapter(model, tmp_path / "out", "third")),
        (ValueError, "'second' is active: switch to another", lambda: rosa.delete_adapter(model, "second")),
    ]
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
    with rosa.disabled(model):
        for call in (
            lambda: rosa.set_adapter(model, "default"),
            lambda: rosa.patch(model, CONFIGS["upper"], "third"),
            lambda: rosa.load_adapter(model, tmp_path),
            lambda: rosa.unpatch(model),
        ):
            with pytest.raises(ValueError, match="cannot be changed inside `with rosa.disabled"):
                call()
    assert same(fingerprint(model), before) and torch.equal(logits(model, batch), ours)
    assert rosa.adapter_names(model) == ["default", "second"] and not (tmp_path / "out").exists()
    for call in (
        rosa.adapter_names,
        rosa.active_adapter,
        lambda m: rosa.set_adapter(m, "a"),
        lambda m: rosa.disabled(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="is not patched"):
            call(make_model())


def test_adapters_are_saved_and_loaded_by_name(crowd, make_model, batch, dtype, tmp_path):
    model, seen = crowd
    with rosa.disabled(model):
        for name in CONFIGS:
            rosa.save_adapter(model, tmp_path / name, name)
    rosa.save_adapter(model, tmp_path / "active")
    fresh = make_model(dtype=dtype).eval()
    for name in (*CONFIGS, "active"):
        rosa.load_adapter(fresh, tmp_path / name, name)
        assert rosa.active_adapter(fresh) == name
        assert torch.equal(logits(fresh, batch), seen["double" if name == "active" else name])
    rosa.set_adapter(fresh, "wide")
    stirred(fresh, 5)
    rosa.set_adapter(fresh, "upper")
    rosa.load_adapter(fresh, tmp_path / "wide", "wide")  # over one that rests
    assert rosa.adapter_names(fresh) == [*CONFIGS, "active"] and rosa.active_adapter(fresh) == "wide"
    assert torch.equal(logits(fresh, batch), seen["wide"])
    with pytest.raises(ValueError, match="'upper' of this Qwen2ForCausalLM has RosaConfig.*another adapter_name"):
        rosa.load_adapter(fresh, tmp_path / "wide", "upper")
    assert torch.equal(logits(fresh, batch), seen["wide"])


def test_a_deep_copy_has_all_the_adapters_and_is_independent(crowd, batch):
    model, seen = crowd
    twin = copy.deepcopy(model)
    for name in CONFIGS:
        rosa.set_adapter(twin, name)
        assert torch.equal(logits(twin, batch), seen[name])
        stirred(twin, 9)
        assert not torch.equal(logits(twin, batch), seen[name])
    rosa.unpatch(twin)
    assert torch.equal(logits(twin, batch), seen["base"])
    for name in CONFIGS:
        rosa.set_adapter(model, name)
        assert torch.equal(logits(model, batch), seen[name])


def test_layer_selection_steps_only_while_its_adapter_is_in(make_patched, batch):
    model = make_patched().train()
    optimizer = rosa.DynamicLayerSelection(torch.optim.AdamW(rosa.trainable_parameters(model)), model, interval=2)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rosa.patch(model, CONFIGS["upper"], "second")
    model(**batch).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="built for an adapter that is not in the model now"):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    rosa.set_adapter(model, "default")
    model(**batch).loss.backward()
    with rosa.disabled(model), pytest.raises(RuntimeError, match="leave `rosa.disabled`"):
        optimizer.step()
    optimizer.step()
    assert len(optimizer.history) == 2


def test_layer_selection_leaves_the_norms_of_another_adapter_alone(make_patched, batch):
    model = make_patched().train()
    optimizer = rosa.DynamicLayerSelection(torch.optim.SGD(rosa.trainable_parameters(model), lr=0.1), model, interval=2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    assert len(optimizer.selected_layers) == 2
    rosa.patch(model, CONFIGS["wide"], "second")
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in rosa.trainable_parameters(model))


def test_the_trainer_saves_and_resumes_the_active_adapter_under_its_name(make_patched, batch, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)

    def patched():
        return rosa.patch(rosa.patch(make_patched(), CONFIGS["upper"], "resting"), CONFIGS["wide"], "trained")

    model = patched()
    rosa.RosaTrainer(model, arguments, train_dataset=rows).train()
    other = patched()
    rosa.RosaTrainer(other, arguments, train_dataset=rows).train(resume_from_checkpoint=True)
    assert rosa.adapter_names(other) == ["default", "resting", "trained"] and rosa.active_adapter(other) == "trained"
    assert torch.equal(logits(other, batch), logits(model, batch))


@pytest.mark.parametrize("part", ["model", "layers"])
def test_compiled_models_see_every_switch(make_model, batch, part):
    torch.compiler.reset()
    model = make_model(num_hidden_layers=4).eval().requires_grad_(False)
    call = torch.compile(model, backend="eager", fullgraph=True) if part == "model" else model
    if part == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
    inputs = {**batch, "use_cache": False}
    states = {"base": logits(call, inputs)}
    # Without norms, nothing but hooks and modules tells an adapted layer from another.
    names = {"lower": (0, 1), "upper": (2, 3), "all": None}
    for seed, (name, layers) in enumerate(names.items()):
        rosa.patch(model, rosa.RosaConfig(rank=4, r_low=0.5, alpha=2.0, layers=layers, train_norms=False), name)
        states[name] = logits(stirred(model, seed).requires_grad_(False), inputs)
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer._compiled_call_impl = None
    for name in ("lower", "upper", "all", "lower", "upper"):
        rosa.set_adapter(model, name)
        rosa.set_adapter(plain, name)
        assert torch.equal(logits(call, inputs), states[name])
        torch.testing.assert_close(logits(plain, inputs), states[name])
        with rosa.disabled(model):
            assert torch.equal(logits(call, inputs), states["base"])
        assert torch.equal(logits(call, inputs), states[name])
    rosa.unpatch(model)
    assert torch.equal(logits(call, inputs), states["base"])
    assert not any(torch.equal(states["base"], states[name]) for name in names)


def test_what_is_sharded_or_has_no_base_is_refused(make_patched, make_model, batch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = rosa.patch(make_patched(), CONFIGS["upper"], "second")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        before = logits(model, batch)
        for call in (
            lambda: rosa.set_adapter(model, "default"),
            lambda: rosa.patch(model, None, "third"),
            lambda: rosa.disabled(model).__enter__(),
            lambda: rosa.unpatch(model),
        ):
            with pytest.raises(ValueError, match="is sharded over several processes"):
                call()
        assert torch.equal(logits(model, batch), before)
    finally:
        torch.distributed.destroy_process_group()
    filled = rosa.patch(make_model().to("meta"), rosa.RosaConfig(rank=4)).to_empty(device="cpu")
    for call in (lambda: rosa.disabled(filled).__enter__(), lambda: rosa.patch(filled, None, "second")):
        with pytest.raises(ValueError, match="no value when the model was patched, on the meta device"):
            call()


@pytest.mark.gpu
def test_a_resting_adapter_follows_the_model_to_its_device(make_model, batch):
    model = stirred(rosa.patch(make_model().eval(), CONFIGS["wide"], "wide"), 1)
    expected = logits(model, batch)
    rosa.patch(model, CONFIGS["upper"], "upper").to("cuda")
    rosa.set_adapter(model, "wide")
    assert all(p.is_cuda for p in model.parameters())
    torch.testing.assert_close(logits(model, {k: v.cuda() for k, v in batch.items()}).cpu(), expected)


def test_what_trains_is_not_to_be_had_inside_disabled(make_patched):
    model = make_patched()
    with rosa.disabled(model), pytest.raises(ValueError, match="there is no adapter to train: ask before or after it"):
        rosa.trainable_parameters(model)
    assert len(rosa.trainable_parameters(model)) == 24
