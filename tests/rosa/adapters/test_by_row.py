"""Different adapters in one batch: each row computes what its adapter alone computes, and each adapter gets the
gradients of its rows."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import rosa
from tests.rosa.families import make_model as make_family

NEW = 6
ROWS = ["b", None, "a", "b"]
ROSA = rosa.RosaConfig(rank=4, r_low=1.0, alpha=1.0)
KINDS = {
    **{f"road-{v}": [rosa.RoadConfig(variant=v)] * 2 for v in (1, 2, 4)},
    "road-half": [rosa.RoadConfig(variant=1, pairing="half", targets=("q_proj", "k_proj", "v_proj"))] * 2,
    "road-rope": [rosa.RoadConfig(variant=2, pairing="rope", targets=("q_proj", "k_proj"))] * 2,
    "road-different-targets": [
        rosa.RoadConfig(targets=("q_proj", "down_proj"), layers=(0, 1)),
        rosa.RoadConfig(targets=("k_proj", "o_proj"), layers=(1,), adapter_dtype="float64"),
    ],
    "road-norms": [rosa.RoadConfig(train_norms=True)] * 2,
    "rosa": [ROSA] * 2,
    "rosa-different-layers": [
        rosa.RosaConfig(rank=4, r_low=1.0, alpha=1.0, layers=(0,)),
        rosa.RosaConfig(rank=4, r_low=1.0, alpha=1.0, train_norms=False, layers=(1,)),
    ],
    "both": [ROSA, rosa.RoadConfig(variant=2)],
}


def adapted(model, configs, names="abcdefghij"):
    """The model with an adapter of each configuration, stirred."""
    for seed, (name, config) in enumerate(zip(names, configs, strict=False)):
        rosa.patch(model, config, name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in rosa.trainable_parameters(model):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def alone(model, name, call):
    """What `call` gives with one adapter, or with the base."""
    if name is None:
        with rosa.disabled(model):
            return call()
    active = rosa.active_adapter(model)
    rosa.set_adapter(model, name)
    result = call()
    rosa.set_adapter(model, active)
    return result


def fingerprint(model):
    """All that the block may touch: children, values, flags, gradients, hooks and forwards."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: (p.detach().clone(), p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()},
        {name: "forward" in m.__dict__ for name, m in model.named_modules()},
        rosa.active_adapter(model),
    )


def same(a, b):
    equal = a[1].keys() == b[1].keys() and all(torch.equal(a[1][n][0], b[1][n][0]) for n in a[1])
    return (
        equal and [v[1:] for v in a[1].values()] == [v[1:] for v in b[1].values()] and a[2:] == b[2:] and a[0] == b[0]
    )


@pytest.fixture
def inputs():
    """Four rows, two of them padded on the left."""
    ids = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 3), (3, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def make(make_model):
    # Wide weights keep the two best tokens apart, so that rounding cannot decide.
    def make(family="llama", **options):
        return make_model(family, **{"num_hidden_layers": 2, "initializer_range": 0.3, **options}).eval()

    return make


def row(inputs, i):
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in KINDS),
        *(
            (family, kind)
            for family in ("qwen2", "gemma2", "qwen3")
            for kind in ("road-2", "road-norms", "rosa", "both")
        ),
    ],
)
def test_every_row_is_what_its_adapter_gives_alone(make, inputs, family, kind):
    model = adapted(make(family, initializer_range=0.1), KINDS[kind])
    before = fingerprint(model)
    with rosa.adapters_by_row(model, ROWS) as same_model:
        assert same_model is model
        found = logits(model, inputs)
    expected = [alone(model, name, lambda i=i: logits(model, row(inputs, i))[0]) for i, name in enumerate(ROWS)]
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[seen], torch.stack(expected)[seen], atol=1e-5, rtol=1e-5)
    apart = [(expected[0][-1] - other[-1]).abs().max() for other in expected[1:3]]
    assert min(apart) > 0.05  # neither the base nor the other adapter
    assert same(fingerprint(model), before)


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        *(("llama", kind, {}) for kind in ("road-1", "road-4", "road-half", "both")),
        *(
            (family, kind, options)
            for family, kind in (("llama", "road-2"), ("qwen2", "rosa"))
            for options in (
                {},
                {"cache_implementation": "static"},
                {"num_beams": 3},
                {"num_beams": 4, "num_return_sequences": 2},
            )
        ),
    ],
)
def test_generation_gives_each_row_the_tokens_of_its_adapter_alone(make, inputs, family, kind, options):
    model = adapted(make(family), KINDS[kind])
    options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    with rosa.adapters_by_row(model, ROWS):
        found = model.generate(**inputs, **options).unflatten(0, (4, -1))
    for i, name in enumerate(ROWS):
        assert torch.equal(found[i], alone(model, name, lambda i=i: model.generate(**row(inputs, i), **options)))
    assert not torch.equal(
        found[0, 0, 9:], alone(model, "a", lambda: model.generate(**row(inputs, 0), **options))[0, 9:]
    )


@pytest.mark.parametrize("kind", ["road-2", "rosa"])
def test_sampling_draws_from_each_rows_own_distribution(make, inputs, kind):
    model = adapted(make(), KINDS[kind])
    options = dict(do_sample=True, num_return_sequences=3, max_new_tokens=NEW, output_scores=True)
    torch.manual_seed(0)
    with rosa.adapters_by_row(model, ROWS):
        found = model.generate(**inputs, **options, return_dict_in_generate=True)
    for i, name in enumerate(ROWS):
        texts = found.sequences[3 * i : 3 * i + 3]
        mask = torch.cat((inputs["attention_mask"][i].expand(3, -1), torch.ones(3, NEW, dtype=torch.long)), dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
        whole = dict(input_ids=texts, attention_mask=mask, position_ids=positions)
        again = alone(model, name, lambda whole=whole: logits(model, whole))
        for step, scores in enumerate(found.scores):
            alive = (texts[:, 9 : 9 + step] != 2).all(dim=1)
            scores, expected = scores[3 * i : 3 * i + 3][alive], again[:, 8 + step][alive]
            kept = scores.isfinite()  # of the 50 likeliest
            torch.testing.assert_close(scores[kept], expected[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [*((kind, False) for kind in KINDS), ("road-2", True), ("rosa", True), ("both", True)]
)
def test_each_adapter_gets_the_gradients_of_its_rows(make, inputs, kind, checkpointing):
    model = adapted(make("qwen2", initializer_range=0.1), KINDS[kind]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    tokens = (labels[:, 1:] != -100).sum()
    twin = copy.deepcopy(model)
    with rosa.adapters_by_row(model, ROWS):
        for _ in range(2):  # gradients add up
            model(**inputs, labels=labels).loss.backward()

    for name in "ab":
        rosa.set_adapter(twin, name)
        rows = [i for i, other in enumerate(ROWS) if other == name]
        own = {key: tensor[rows] for key, tensor in inputs.items()}
        (2 * twin(**own, labels=labels[rows], num_items_in_batch=tokens).loss).backward()
    for name in "ab":
        rosa.set_adapter(model, name)
        rosa.set_adapter(twin, name)
        parameters = dict(twin.named_parameters())
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert trained
        for key, parameter in trained.items():
            difference = (parameter.grad - parameters[key].grad).norm()
            assert difference < 1e-4 * parameters[key].grad.norm() + 1e-7, (name, key)
            assert parameter.grad.any(), key


def test_training_goes_on_in_the_block_with_the_weights_as_they_are(make, inputs):
    model = adapted(make(), KINDS["road-2"])
    parameters = []
    for name in "ab":
        rosa.set_adapter(model, name)
        parameters += [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    with rosa.adapters_by_row(model, ROWS):
        for _ in range(3):
            before = logits(model, inputs)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found = logits(model, inputs)
            assert torch.equal(found[1], before[1]) and not torch.allclose(found[0], before[0])
    expected = alone(model, "b", lambda: logits(model, row(inputs, 0)))
    torch.testing.assert_close(found[:1], expected, atol=1e-5, rtol=1e-5)


def test_after_inference_mode_the_same_rows_train(make, inputs):
    model = adapted(make(), KINDS["road-2"])
    with rosa.adapters_by_row(model, ROWS):
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=2, num_beams=2)
        twice = {name: tensor.repeat_interleave(2, 0) for name, tensor in inputs.items()}
        model(**twice, labels=twice["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["road-2", "rosa"])
def test_a_step_that_counts_no_version_is_seen(make, inputs, kind):
    model = adapted(make(), [KINDS[kind][0]] * 2)
    trained = rosa.trainable_parameters(model)
    with rosa.adapters_by_row(model, ROWS):
        before = logits(model, inputs)
        model(**inputs).logits.sum().backward()
        for parameter in trained:
            parameter.data.add_(0.1)  # as bitsandbytes' optimizers do
        after = logits(model, inputs)
    with rosa.adapters_by_row(model, ROWS):
        expected = logits(model, inputs)
    assert not torch.equal(after, before) and torch.equal(after, expected)


@pytest.mark.parametrize("kind", ["road-2", "road-norms", "rosa", "both"])
def test_a_block_that_begins_inside_inference_mode(make, inputs, kind):
    model = adapted(make("qwen2", dtype=torch.bfloat16), KINDS[kind])
    with rosa.adapters_by_row(model, ROWS):
        expected = logits(model, inputs)
    with torch.inference_mode(), rosa.adapters_by_row(model, ROWS):
        assert torch.equal(logits(model, inputs), expected)
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("kind", ["road-2", "road-norms", "rosa", "both"])
def test_a_bfloat16_base_with_float32_adapters(make, inputs, kind):
    model = adapted(make("qwen2", dtype=torch.bfloat16, initializer_range=0.1), KINDS[kind])
    with rosa.adapters_by_row(model, ROWS):
        found = logits(model, inputs)
    assert found.dtype == torch.bfloat16
    seen = inputs["attention_mask"].bool()
    for i, name in enumerate(ROWS):
        expected = alone(model, name, lambda i=i: logits(model, row(inputs, i)))[0]
        difference = (found[i] - expected)[seen[i]].float().norm() / expected[seen[i]].float().norm()
        assert difference < 0.03  # a few roundings to 8 bits
        other = alone(model, "a" if name != "a" else "b", lambda i=i: logits(model, row(inputs, i)))[0]
        assert (found[i] - other)[seen[i]].float().norm() / other[seen[i]].float().norm() > 0.1


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("phi", ROSA),  # layer norms with a bias
        ("stablelm", rosa.RoadConfig(train_norms=True)),
        ("cohere", ROSA),  # layer norms of its own
        ("olmo2", ROSA),
        ("qwen2_moe", rosa.RoadConfig(train_norms=True)),  # whose shared experts compute tokens without their rows
    ],
)
def test_other_norms_and_tokens_without_their_rows(inputs, family, config):
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=96, pad_token_id=0, max_position_embeddings=64, num_experts=4,
        moe_intermediate_size=24, shared_expert_intermediate_size=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, initializer_range=0.2, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape) if name.endswith("bias") else 0  # which begin at zero
    adapted(model, [config] * 2)
    with rosa.adapters_by_row(model, ROWS):
        found = logits(model, inputs)
    seen = inputs["attention_mask"].bool()
    for i, name in enumerate(ROWS):
        expected = alone(model, name, lambda i=i: logits(model, row(inputs, i)))[0]
        torch.testing.assert_close(found[i][seen[i]], expected[seen[i]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["road-norms", "rosa"])
@pytest.mark.parametrize("family", ["gemma3n_text", "hy_v4"])
def test_rows_before_and_behind_a_dimension_of_streams(inputs, family, kind):
    """Hidden states are [streams, batch, seq, width] in Gemma 3n, [batch, seq, streams, width] in HY 4."""
    model = adapted(make_family(family), KINDS[kind]).eval()
    ids = inputs["input_ids"][:3, :8]  # of no length that is a multiple of the rows
    with rosa.adapters_by_row(model, ROWS[:3]):
        found = logits(model, {"input_ids": ids})
        with pytest.raises(ValueError, match="was given 3 rows and the model a batch of 2"):
            model(ids[:2])
    for i, name in enumerate(ROWS[:3]):
        expected = alone(model, name, lambda i=i: logits(model, {"input_ids": ids[i : i + 1]}))[0]
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["road-2", "rosa"])
def test_many_adapters_cost_the_launches_of_one(make, inputs, kind):
    config = KINDS[kind][0]
    model = adapted(make(), [config] * 8)

    def launches(rows):
        with rosa.adapters_by_row(model, rows), torch.no_grad():
            model(**inputs)  # which makes the tables
            with _Operators() as counted:
                model(**inputs)
        return counted.names

    assert launches(["a"] * 4) == launches(["a", "b", "c", "d"]) == launches(["e", None, "h", "a"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["road-2", "rosa"])
@torch.no_grad()
def test_a_forward_pass_by_rows_is_captured_and_replayed(make, kind):
    model = adapted(make(attn_implementation="eager"), KINDS[kind]).cuda()

    def forward(ids):  # the mask is made here: making it, transformers asks the device whether the batch is packed
        mask = torch.full((4, 1, 9, 9), float("-inf"), device="cuda").triu(1)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    ids = torch.randint(3, 96, (4, 9), device="cuda")
    with rosa.adapters_by_row(model, ROWS):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward(ids)
        for _ in range(2):
            ids.copy_(torch.randint(3, 96, (4, 9), device="cuda"))
            graph.replay()
            torch.testing.assert_close(captured, forward(ids))


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["road-2", "rosa"])
def test_a_compiled_model_computes_by_rows_and_by_others_and_as_before(make, inputs, kind):
    torch.compiler.reset()
    model = adapted(make(num_hidden_layers=1), KINDS[kind])
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    before = logits(compiled, inputs)
    for rows in (ROWS, ["a", "b", None, None]):
        with rosa.adapters_by_row(model, rows):
            torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
    assert torch.equal(logits(compiled, inputs), before)
    assert graphs.frame_count == (2 if kind == "road-2" else 3)  # norms of RoSA's are compiled for each block
    torch.compiler.reset()


def test_a_quantized_base(make, inputs):
    torchao = pytest.importorskip("torchao.quantization")
    model = make("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    adapted(model, KINDS["road-2"])
    with rosa.adapters_by_row(model, ROWS):
        found = logits(model, inputs)
    for i, name in enumerate(ROWS):
        expected = alone(model, name, lambda i=i: logits(model, row(inputs, i)))
        torch.testing.assert_close(found[i, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


def test_rows_of_the_base_alone_are_the_base(make, inputs):
    model = adapted(make(), KINDS["rosa"])
    with rosa.adapters_by_row(model, [None] * 4):
        found = logits(model, inputs)
    assert torch.equal(found, alone(model, None, lambda: logits(model, inputs)))


# Errors


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused_with_both_numbers(make, inputs):
    model = adapted(make(), KINDS["road-2"])
    before, expected = fingerprint(model), logits(model, inputs)
    for rows, batch in ((["a", None, "b"], 4), (["a"] * 5, 4)):
        with (
            pytest.raises(ValueError, match=f"given {len(rows)} rows and the model a batch of {batch}"),
            rosa.adapters_by_row(model, rows),
        ):
            model(**inputs)
        assert same(fingerprint(model), before)
    batch_of_8 = pytest.raises(ValueError, match="given 3 rows and the model a batch of 8")
    with batch_of_8, rosa.adapters_by_row(model, ["a", None, "b"]):
        model.generate(**inputs, num_beams=2, max_new_tokens=2)
    assert same(fingerprint(model), before) and torch.equal(logits(model, inputs), expected)


def test_what_cannot_be_done_is_refused_and_changes_nothing(make, inputs):
    model = adapted(make(), [rosa.RoadConfig(), ROSA])
    rosa.patch(model, rosa.RoadConfig(variant=1), "one")
    rosa.patch(model, rosa.RoadConfig(pairing="half", targets=("q_proj",)), "half")
    rosa.patch(model, rosa.RosaConfig(rank=2), "rank")
    before, expected = fingerprint(model), logits(model, inputs)
    refused = [
        (KeyError, "no adapter 'c'; it has a, b, one, half, rank", ["a", "c"]),
        (ValueError, "adapter_names is empty", []),
        (TypeError, "a sequence with a name or None for each row, got 'ab'", "ab"),
        (ValueError, "'a' and 'one' cannot share a batch: variant is 2 in 'a' and 1 in 'one'", ["a", None, "one"]),
        (ValueError, "'a' and 'half' cannot share a batch: pairing is 'neighbours' in", ["a", "half"]),
        (ValueError, "'b' and 'rank' cannot share a batch: r_low is 1.0 in 'b' and 0.25 in 'rank'", ["b", "rank"]),
    ]
    for error, message, rows in refused:
        with pytest.raises(error, match=message), rosa.adapters_by_row(model, rows):
            pass
    within = pytest.raises(ValueError, match="cannot be changed inside `with rosa.disabled")
    with rosa.disabled(model), within, rosa.adapters_by_row(model, ["a"] * 4):
        pass
    assert same(fingerprint(model), before) and torch.equal(logits(model, inputs), expected)
    with pytest.raises(ValueError, match="is not patched"), rosa.adapters_by_row(make(), ["a"]):
        pass


def test_where_rope_turns_lora_over_road_both_kinds_share_no_batch(make, inputs):
    model = adapted(make(), KINDS["both"])
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    before = fingerprint(model)
    refusal = pytest.raises(
        ValueError, match=r"RoSA's and RoAd's .* cannot share a batch: .*0.self_attn.q_proj was wrapped"
    )
    with refusal, rosa.adapters_by_row(model, ROWS):
        pass
    assert same(fingerprint(model), before)
    for name in ("a", "b"):
        with rosa.adapters_by_row(model, [name, None] * 2):
            found = logits(model, inputs)
        for i, own in enumerate([name, None] * 2):
            expected = alone(model, own, lambda i=i: logits(model, row(inputs, i)))
            torch.testing.assert_close(found[i, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["q_proj", "v_proj"])
def test_lora_that_road_turns_wherever_it_stands_leaves_both_kinds_one_batch(make, inputs, target):
    model = make()
    lora = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    if target == "v_proj":
        model = get_peft_model(adapted(model, KINDS["both"]), lora).eval()
    else:
        model = adapted(get_peft_model(model, lora).eval(), KINDS["both"])
    with rosa.adapters_by_row(model, ROWS):
        found = logits(model, inputs)
    for i, name in enumerate(ROWS):
        expected = alone(model, name, lambda i=i: logits(model, row(inputs, i)))
        torch.testing.assert_close(found[i, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


def test_within_the_block_adapters_stay_as_they_are_and_after_an_exception_all_is_as_before(make, inputs, tmp_path):
    model = adapted(make(), KINDS["both"])
    rosa.save_adapter(model, tmp_path)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="inside"), rosa.adapters_by_row(model, ROWS):
        found = logits(model, inputs)
        for call in (
            lambda: rosa.set_adapter(model, "a"),
            lambda: rosa.delete_adapter(model, "a"),
            lambda: model.save_pretrained(tmp_path / "model"),
            lambda: rosa.patch(model, ROSA, "c"),
            lambda: rosa.load_adapter(model, tmp_path, "c"),
            lambda: rosa.unpatch(model),
            lambda: rosa.disabled(model).__enter__(),
            lambda: rosa.adapters_by_row(model, ROWS).__enter__(),
        ):
            with pytest.raises(ValueError, match="leave the block first"):
                call()
        assert torch.equal(logits(model, inputs), found)
        raise RuntimeError("inside")
    assert same(fingerprint(model), before) and not (tmp_path / "model").exists()
    with rosa.adapters_by_row(model, ROWS):
        assert torch.equal(logits(model, inputs), found)


def test_a_norm_that_takes_one_weight_only_is_refused_and_changes_nothing(make, inputs):
    class FusedNorm(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width))

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight)

    model = make()
    model.model.layers[1].input_layernorm = FusedNorm(32)
    adapted(model, KINDS["rosa"])
    before = fingerprint(model)
    refused = pytest.raises(rosa.UnsupportedModelError, match="FusedNorm cannot have a weight for each row")
    with refused, rosa.adapters_by_row(model, ROWS):
        pass
    assert same(fingerprint(model), before)


def test_tokens_without_their_rows_are_refused(make, inputs):
    model = adapted(make(), KINDS["road-2"])
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1)[:8])  # as an expert computes some of the tokens
    refused = pytest.raises(rosa.UnsupportedModelError, match="computes 8 tokens without their rows")
    with refused, rosa.adapters_by_row(model, ROWS):
        model(**inputs)


def test_data_parallel_is_refused(make, tmp_path):
    model = adapted(make(), KINDS["road-2"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        with pytest.raises(ValueError, match="DistributedDataParallel averages"), rosa.adapters_by_row(wrapped, ROWS):
            pass
    finally:
        torch.distributed.destroy_process_group()
