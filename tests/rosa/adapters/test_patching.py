"""patch and unpatch: what they add, what they count, what they refuse, and that nothing is left behind."""

import copy
import functools
import io
import sys
import threading

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

import rosa
from rosa.models.decoder import rotary_functions
from rosa.models.rotary import AdaptedCos


def fingerprint(model):
    """All that patch may change: parameters, flags, modules and hooks, and the class's rotary function apart."""
    return (
        {name: (p.detach().clone(), p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        [name for name, _ in model.named_modules()],
        {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()},
        sorted(model.__dict__),
    )


def same(a, b):
    values = all(torch.equal(a[0][n][0], b[0][n][0]) and a[0][n][1:] == b[0][n][1:] for n in a[0])
    return a[0].keys() == b[0].keys() and values and a[1:] == b[1:]


# The paper's Table 1, from the models' own configurations.
PAPER = [
    (Qwen2Config, 0.261, dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
     num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)),
    (LlamaConfig, 0.329, dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
     num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)),
    (Gemma2Config, 0.363, dict(vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
     num_attention_heads=16, num_key_value_heads=8, head_dim=256, tie_word_embeddings=True)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "percent", "sizes"), PAPER, ids=["Qwen2.5-7B", "Llama-3.1-8B", "Gemma-2-9B"])
def test_trainable_parameters_are_those_of_the_papers_table_1(config, percent, sizes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**sizes))
    base = sum(p.numel() for p in model.parameters())
    rosa.patch(model)
    trainable, total, measured = rosa.count_parameters(model)
    assert round(measured, 3) == percent
    roae = sum(p.numel() for n, p in model.named_parameters() if ".roae." in n)
    assert total == base + roae and trainable == sum(p.numel() for p in rosa.trainable_parameters(model))
    assert all(p.is_meta for p in model.parameters())


def test_what_is_added_and_what_trains(family, make_model):
    model = rosa.patch(make_model(family), rosa.RosaConfig(rank=8, r_low=0.5))
    roae = model.model.layers[2].self_attn.roae
    # n = 16 * 0.5 / 2 = 4, d_low = 8
    assert {name: tuple(p.shape) for name, p in roae.named_parameters()} == {
        "down": (8, 32), "up": (4 * 8, 8), "gqa_down": (8, 4 * 8), "gqa_up": (2 * 8, 8),
    }  # fmt: skip
    assert not roae.up.any() and roae.down.any() and roae.gqa_down.any() and roae.gqa_up.any()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = 4 if family == "gemma2" else 2
    assert len(trained) == 4 * (4 + norms)
    assert all(".roae." in n or ("norm" in n and "self_attn" not in n and "layers." in n) for n in trained)
    assert rosa.is_patched(model) and not rosa.is_patched(make_model(family))


def test_options_of_the_configuration(make_model):
    config = rosa.RosaConfig(rank=4, train_norms=False, layers=(1, 3), adapter_dtype="bfloat16")
    model = rosa.patch(make_model(num_key_value_heads=4), config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"model.layers.{i}.self_attn.roae.{w}" for i in (1, 3) for w in ("down", "up")}
    assert all(p.dtype == torch.bfloat16 for p in trained.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_stay_in_their_own_dtype_and_the_output_in_the_models(make_patched, batch, dtype):
    model = make_patched(dtype=dtype).train()
    output = model(**batch)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for n, p in model.named_parameters() if ".roae." in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpatch_restores_the_model_exactly(family, make_model, stir, batch, dtype):
    model = make_model(family, dtype=dtype)
    model.lm_head.weight.requires_grad_(False)
    before, logits = fingerprint(model), model(**batch).logits
    rosa.patch(model, rosa.RosaConfig(rank=4))
    stir(model)
    model(**batch).loss.backward()
    assert not torch.equal(model(**batch).logits, logits)
    assert rosa.unpatch(model) is model
    assert same(fingerprint(model), before) and torch.equal(model(**batch).logits, logits)
    assert all(p.grad is None for p in model.parameters())
    rosa.unpatch(rosa.patch(model))
    assert same(fingerprint(model), before)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(make_model, default):
    torch.set_default_dtype(default)
    try:
        model = rosa.patch(make_model(dtype=torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in rosa.trainable_parameters(model)} == {torch.float32}


def test_other_models_of_the_family_are_untouched(make_model, make_patched, batch):
    other = make_model().eval()
    before = other(**batch).logits
    patched = make_patched().eval()
    assert torch.equal(other(**batch).logits, before)
    assert not torch.equal(patched(**batch).logits, before)


def test_models_are_patched_and_saved_in_threads_while_one_runs(make_model, make_patched, batch, tmp_path):
    model = make_patched().eval()
    expected = model(**batch).logits
    runs, errors = threading.Event(), []
    runs.set()

    def work(folder):
        try:
            while runs.is_set():
                rosa.save_adapter(rosa.patch(make_model()), folder)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tmp_path / str(i),)) for i in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        assert all(torch.equal(model(**batch).logits, expected) for _ in range(50))
    finally:
        runs.clear()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not errors


def test_a_deep_copy_is_a_model_of_its_own(make_patched, batch):
    model = make_patched().eval()
    twin = copy.deepcopy(model)
    logits = model(**batch).logits
    assert torch.equal(twin(**batch).logits, logits)
    with torch.no_grad():
        twin.model.layers[0].self_attn.roae.up.zero_()
    assert torch.equal(model(**batch).logits, logits) and not torch.equal(twin(**batch).logits, logits)
    rosa.unpatch(twin)
    assert rosa.is_patched(model) and torch.equal(model(**batch).logits, logits)


def test_a_model_spread_over_devices_gets_each_adapter_beside_its_attention(make_model):
    model = make_model()
    model.model.layers[2:].to("meta")  # a second device that every machine has
    rosa.patch(model, rosa.RosaConfig(rank=4))
    devices = [layer.self_attn.roae.down.device.type for layer in model.model.layers]
    assert devices == ["cpu", "cpu", "meta", "meta"]


def test_printed_counts(make_patched, capsys):
    model = make_patched()
    rosa.print_trainable_parameters(model)
    trainable, total, percent = rosa.count_parameters(model)
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percent:.4f}\n"
    )


TINY = dict(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
OTHERS = [
    (GPT2LMHeadModel, GPT2Config(**TINY)),
    (BloomForCausalLM, BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)),
    (
        BertModel,
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
    ),
]


@pytest.mark.parametrize(("kind", "config"), OTHERS, ids=lambda v: getattr(v, "__name__", ""))
def test_models_without_rotary_attention_are_refused(kind, config):
    model = kind(config)
    before = fingerprint(model)
    with pytest.raises(rosa.UnsupportedModelError, match=f"{kind.__name__} has no rotary attention"):
        rosa.patch(model)
    assert same(fingerprint(model), before)


def test_an_unknown_rotary_function_is_refused(make_model, monkeypatch):
    model = make_model()
    before = fingerprint(model)
    functions = rotary_functions(type(model.model.layers[0].self_attn)).namespace
    original = functions["apply_rotary_pos_emb"]

    @functools.wraps(original)
    def backwards(q, k, cos, sin, *args):
        return original(q, k, cos.flip(-1), sin.flip(-1), *args)

    monkeypatch.setitem(functions, "apply_rotary_pos_emb", backwards)
    with pytest.raises(rosa.UnsupportedModelError, match=r"Qwen2Attention of .*fits no known layout for heads of 16"):
        rosa.patch(model)
    assert same(fingerprint(model), before)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (rosa.RosaConfig(r_low=0.05), ValueError, "r_low=0.05 leaves no pair of 16 rotary elements"),
        (rosa.RosaConfig(layers=(1, 4)), ValueError, "layers names layer 4, but Qwen2ForCausalLM has 4"),
        ({"r_low": 0.5}, TypeError, "config must be a rosa.RosaConfig or a rosa.RoadConfig, got dict"),
    ],
)
def test_a_configuration_that_does_not_fit_changes_nothing(make_model, config, error, message):
    model = make_model()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        rosa.patch(model, config)
    assert same(fingerprint(model), before)


def test_patching_twice_and_unpatching_what_is_not_patched(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="Qwen2ForCausalLM is not patched; call rosa.patch"):
        rosa.unpatch(model)
    rosa.patch(model, rosa.RosaConfig(rank=4))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="patched already; call rosa.unpatch"):
        rosa.patch(model)
    assert same(fingerprint(model), before)


def part_of_a_copy(model):
    return copy.deepcopy(model).model


def part_of_a_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False).model


def another_with_the_same_trunk(model):
    other = Qwen2ForSequenceClassification(model.config)
    other.model = model.model
    return other


def trunk_in_lora(model):
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return model.model


PARTS = {
    "trunk": lambda model: model.model,
    "layer": lambda model: model.model.layers[2],
    "compiled trunk": lambda model: torch.compile(model.model, backend="eager"),
    "copy of the trunk": lambda model: copy.deepcopy(model.model),
    "trunk of a copy": part_of_a_copy,
    "trunk of a pickle": part_of_a_pickle,
    "another model": another_with_the_same_trunk,
    "trunk in LoRA": trunk_in_lora,
}


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_patched_model_is_referred_to_its_owner(make_patched, tmp_path, part):
    model = make_patched()
    rosa.save_adapter(model, tmp_path)
    part = PARTS[part](model)
    before = fingerprint(part)
    assert rosa.is_patched(part)
    for call in (
        rosa.patch,
        lambda part: rosa.patch(part, None, "second"),
        lambda part: rosa.load_adapter(part, tmp_path),
        lambda part: rosa.save_adapter(part, tmp_path),
        lambda part: rosa.set_adapter(part, "default"),
        lambda part: rosa.disabled(part).__enter__(),
        rosa.trainable_parameters,
        rosa.count_parameters,
        rosa.unpatch,
    ):
        with pytest.raises(ValueError, match=r"has layers of a Qwen2ForCausalLM that rosa.patch has patched: call it"):
            call(part)
    assert same(fingerprint(part), before)


def test_the_parts_of_a_model_are_free_once_it_is_unpatched(make_patched):
    model = make_patched()
    rosa.patch(model, rosa.RosaConfig(rank=2, layers=(1,)), "second")
    rosa.unpatch(model)
    assert not rosa.is_patched(model.model)
    rosa.patch(model.model, rosa.RosaConfig(rank=4))
    assert rosa.is_patched(model) and not rosa.is_patched(model.lm_head)
    rosa.unpatch(model)
    assert not rosa.is_patched(model.model)


def test_nothing_is_patched_inside_inference_mode(make_model, make_patched, tmp_path):
    rosa.save_adapter(make_patched(), tmp_path)
    model = make_model()
    before = fingerprint(model)
    for call in (rosa.patch, lambda model: rosa.load_adapter(model, tmp_path)):
        with torch.inference_mode(), pytest.raises(ValueError, match="made inside torch.inference_mode.* never train"):
            call(model)
    assert same(fingerprint(model), before)
    rosa.patch(model)


def test_a_model_made_inside_inference_mode_is_refused(make_model):
    with torch.inference_mode():
        model = make_model()
    before = fingerprint(model)
    with pytest.raises(rosa.UnsupportedModelError, match="embed_tokens.weight of this Qwen2ForCausalLM was made"):
        rosa.patch(model)
    assert same(fingerprint(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_norms_are_widened_compute_the_same_and_train(family, make_model, batch, dtype):
    model = make_model(family, dtype=dtype).train()
    norm = model.model.layers[1].input_layernorm
    x = torch.randn(3, 5, 32).to(dtype)
    before = norm(x)
    rosa.patch(model, rosa.RosaConfig(rank=4))
    assert norm.weight.dtype == torch.float32 and model.model.norm.weight.dtype == dtype
    assert norm(x).dtype == dtype and torch.equal(norm(x), before)
    weights = norm.weight.detach().clone()
    optimizer = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()
    assert (norm.weight != weights).float().mean() > 0.9  # in 16 bits the step would round to none


def test_norms_stay_as_they_are_where_the_adapter_is_no_wider(make_model):
    model = rosa.patch(make_model(dtype=torch.bfloat16), rosa.RosaConfig(rank=4, adapter_dtype="bfloat16"))
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16
    model = rosa.patch(make_model(dtype=torch.float64), rosa.RosaConfig(rank=4))
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float64


def test_a_model_patched_on_the_meta_device_and_filled_afterwards_is_unpatched(make_model):
    model = rosa.patch(make_model(dtype=torch.bfloat16).to("meta"), rosa.RosaConfig(rank=4))
    model.to_empty(device="cpu")
    torch.nn.init.constant_(model.model.layers[0].input_layernorm.weight, 2.0)
    rosa.unpatch(model)
    weight = model.model.layers[0].input_layernorm.weight
    assert weight.dtype == torch.bfloat16 and (weight == 2).all() and not rosa.is_patched(model)


def test_a_compiled_model_is_patched_inside_its_wrapper(make_model):
    model = make_model()
    wrapper = torch.compile(model, backend="eager")
    assert rosa.patch(wrapper, rosa.RosaConfig(rank=4)) is wrapper
    assert rosa.is_patched(wrapper) and rosa.count_parameters(wrapper) == rosa.count_parameters(model)
    rosa.unpatch(wrapper)
    assert not rosa.is_patched(model)


def test_parameters_renamed_since_are_named_and_nothing_is_undone(make_patched):
    model = make_patched()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="have other names since it was patched, .*q_proj.weight among them"):
        rosa.unpatch(model)
    assert same(fingerprint(model), before) and rosa.is_patched(model)


def test_an_offloaded_model_is_refused(make_model):
    offloaded = cpu_offload(make_model(), execution_device="cpu")
    with pytest.raises(rosa.UnsupportedModelError, match="self_attn is offloaded to the CPU or to disk"):
        rosa.patch(offloaded)


def test_cos_of_another_width_than_was_found_is_refused(make_patched):
    roae = make_patched().model.layers[0].self_attn.roae
    q, cos = torch.randn(1, 4, 3, 16), torch.randn(1, 3, 8)
    with pytest.raises(
        rosa.UnsupportedModelError, match="a cos or sin 8 wide; when it was patched, 16 was found to fit"
    ):
        roae(q, q[:, :2], cos, cos, torch.randn(1, 3, 32))


def test_further_arguments_of_the_rotary_function_are_refused(make_patched):
    attention = make_patched().model.layers[0].self_attn
    handed = AdaptedCos(torch.randn(1, 3, 16), torch.randn(1, 3, 32), attention.roae)
    rope = rotary_functions(type(attention)).namespace["apply_rotary_pos_emb"]
    with pytest.raises(rosa.UnsupportedModelError, match=r"with 5 arguments, and by name \[\]: RoSA knows"):
        rope(None, None, handed, None, [8, 4, 4])
    with pytest.raises(rosa.UnsupportedModelError, match=r"with 4 arguments, and by name \['mrope_section'\]"):
        rope(None, None, handed, None, mrope_section=[8, 4, 4])
