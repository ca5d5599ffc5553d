"""Measured activations against rotated queries and keys computed by hand, in every kind of layout."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rosa
from rosa.inspection.activations import (
    R_LOWS,
    STATES,
    energy_shares,
    measure,
    token_batches,
    usable_r_lows,
)
from rosa.models.decoder import rotary_functions
from rosa.models.probe import rotary_sites

from . import families
from .tiny_qwen2 import tiny_tokenizer

# Heads of 16: how many elements rotate, how many the rotary function is handed, and whether pairs are 2i, 2i + 1.
LAYOUTS = {
    "llama": (16, 16, False, {}),
    "cohere": (16, 16, True, {}),
    "glm": (8, 16, True, {}),
    "stablelm": (8, 8, False, {"partial_rotary_factor": 0.5}),
}


def make(family, **changes):
    sizes = dict(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def padded_on_the_left(lengths=(11, 7)):
    ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


def rotated_by_hand(model, batch, rotary_dim, width, interleaved):
    """For each layer, the rotated queries and keys of the tokens that are not padding, `[tokens, heads, width]`."""
    projected = {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda module, args, output, key=(i, name): projected.update({key: output})
        )
        for i, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    pairs = torch.arange(rotary_dim // 2)
    re, im = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + rotary_dim // 2)
    theta = model.config.rope_parameters["rope_theta"] ** (-2 * pairs / rotary_dim)
    angle = (batch["position_ids"][..., None] * theta)[:, :, None]
    states = []
    for i in range(len(model.model.layers)):
        both = []
        for name in ("q_proj", "k_proj"):
            x = projected[i, name].unflatten(-1, (-1, 16))[..., :width]
            turned = x.clone()
            turned[..., re] = x[..., re] * angle.cos() - x[..., im] * angle.sin()
            turned[..., im] = x[..., im] * angle.cos() + x[..., re] * angle.sin()
            both.append(turned[batch["attention_mask"].bool()].double())
        states.append(both)
    return states, torch.stack((re, im), dim=1)


@pytest.mark.parametrize("family", LAYOUTS)
def test_norms_and_energies_are_those_of_states_rotated_by_hand(family):
    rotary_dim, width, interleaved, changes = LAYOUTS[family]
    model, batch = make(family, **changes), padded_on_the_left()
    by_hand, pairs = rotated_by_hand(model, batch, rotary_dim, width, interleaved)
    measured = measure(model, [batch])
    assert [one.layer for one in measured] == [0, 1]
    assert [one.attention for one in measured] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for one, states in zip(measured, by_hand, strict=True):
        assert one.tokens == 11 + 7
        for name, x in zip(STATES, states, strict=True):
            norms = torch.stack([x[:, head].norm(dim=0) for head in range(x.shape[1])]).mean(0) / math.sqrt(18)
            torch.testing.assert_close(one.norms(name), norms, rtol=1e-5, atol=1e-6)
            energy = torch.stack([x[..., pair].square().sum() for pair in pairs])
            torch.testing.assert_close(one.pair_energy(name), energy, rtol=1e-5, atol=1e-6)
            total = x[..., :rotary_dim].square().sum().item()
            assert one.pair_energy(name).sum().item() == pytest.approx(total, rel=1e-6)
            assert one.squares[name].sum().item() == pytest.approx(x.square().sum().item(), rel=1e-6)
        assert one.by_pair.tolist() == pairs.flatten().tolist()


def test_shares_are_the_energy_of_the_last_pairs():
    model, batch = make("llama"), padded_on_the_left()
    by_hand, pairs = rotated_by_hand(model, batch, 16, 16, False)
    measured = measure(model, [batch])
    shares = energy_shares(measured, [0.5, 0.3, 1.0])
    assert [(share.r_low, share.layer) for share in shares] == [(r, n) for r in (0.3, 0.5, 1.0) for n in (None, 0, 1)]

    def share(states, count):
        low = pairs[-count:].flatten()
        return sum(x[..., low].square().sum() for x in states).item() / sum(x.square().sum() for x in states).item()

    for found, count in zip(shares[:6], [2] * 3 + [4] * 3, strict=True):
        layers = by_hand if found.layer is None else [by_hand[found.layer]]
        assert found.uniform == count / 8  # 0.3 of 8 pairs are 2, as RoAE counts them
        assert found.queries == pytest.approx(share([q for q, _ in layers], count), rel=1e-5)
        assert found.keys == pytest.approx(share([k for _, k in layers], count), rel=1e-5)
        assert found.both == pytest.approx(share([x for both in layers for x in both], count), rel=1e-5)
    for found in shares[6:]:
        assert found[2:] == pytest.approx((1, 1, 1, 1))


def test_of_the_usual_r_lows_those_are_left_out_that_leave_a_layer_no_pair():
    measured = measure(make("llama"), [padded_on_the_left()])
    assert usable_r_lows(measured) == [r_low for r_low in R_LOWS if r_low >= 1 / 8]
    with pytest.raises(ValueError, match="r_low=0.1 leaves no pair of 16 rotary elements"):
        energy_shares(measured, [0.1])
    with pytest.raises(ValueError, match=r"r_low must lie in \(0, 1\], got 1.5"):
        energy_shares(measured, [1.5])


@pytest.mark.parametrize("family", ["llama", "cohere", "llama4_text", "deepseek_v2", "deepseek_v32"])
def test_with_an_adapter_the_states_are_those_after_roae(family, stir, monkeypatch):
    """Llama 4 and DeepSeek V2 rotate by a complex cos + i sin, DeepSeek V3.2 has indexers that rotate on their own."""
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    model = stir(rosa.patch(families.make_model(family), rosa.RosaConfig(rank=4, r_low=0.5, alpha=1.0)))
    adapters = [module for name, module in model.named_modules() if name.endswith(".roae")]
    outputs = []
    hooks = [a.register_forward_hook(lambda module, args, output: outputs.append((module, output))) for a in adapters]
    ids = torch.randint(3, 96, (2, 9))
    measured = measure(model, [{"input_ids": ids}])
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(measured) == len(adapters)
    for one, (adapter, states) in zip(measured, outputs, strict=True):
        for name, x in zip(STATES, states, strict=True):
            x = adapter.layout.heads_first(x).double()
            torch.testing.assert_close(one.squares[name], x.square().sum((0, 2)))
    with rosa.disabled(model):
        before = measure(model, [{"input_ids": ids}])
    assert not torch.allclose(before[0].squares["queries"], measured[0].squares["queries"])


def test_layers_without_an_adapter_are_measured_beside_those_with_one(make_patched, batch):
    model = make_patched(config=rosa.RosaConfig(rank=4, layers=(1, 3)))
    del batch["labels"]
    assert [one.layer for one in measure(model, [batch])] == [0, 1, 2, 3]


def test_queries_and_keys_that_are_rotated_apart_are_told_apart_and_may_be_queries_alone():
    model = families.make_model("gemma4_text")
    before_rotation = {}
    for i, layer in enumerate(model.model.layers):
        for states, norm in zip(STATES, ("q_norm", "k_norm"), strict=True):
            if hasattr(layer.self_attn, norm):
                getattr(layer.self_attn, norm).register_forward_hook(
                    lambda module, args, output, key=(i, states): before_rotation.update({key: output.double()})
                )
    measured = measure(model, [{"input_ids": torch.randint(3, 96, (2, 9))}])
    assert [list(one.squares) for one in measured] == [list(STATES)] * 3 + [["queries"]]
    for one in measured:
        for states, squares in one.squares.items():
            energy = before_rotation[one.layer, states].square().sum((0, 1, 3))  # rotation keeps it, head by head
            torch.testing.assert_close(squares.sum(1), energy, rtol=1e-5, atol=1e-6)
    last = next(share for share in energy_shares(measured, [0.5]) if share.layer == 3)
    assert last.keys is None and last.both == last.queries


def functions(model):
    """The rotary functions that the model's attention would call now."""
    found = [rotary_functions(type(site.attention)) for site in rotary_sites(model)]
    return [namespace[name] for namespace, names in found for name in names]


def state(model):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return functions(model), [name for name, _ in model.named_modules()], hooks, [m.training for m in model.modules()]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_as_it_was(make_model, make_patched, batch, patched, fails):
    model = (make_patched if patched else make_model)("llama")
    model.train()
    model.model.layers[1].eval()
    del batch["labels"]
    before, logits = state(model), model(**batch).logits
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            measure(model, _one_then_error(batch))
    else:
        measure(model, [batch])
    assert state(model) == before
    assert torch.equal(model(**batch).logits, logits)


def _one_then_error(batch):
    yield batch
    raise RuntimeError("on purpose")


def test_a_failure_within_attention_leaves_the_model_as_it_was(make_model, batch):
    model = make_model("llama")
    del batch["labels"]

    def fail(module, args, output):
        raise RuntimeError("on purpose")

    hook = model.model.layers[2].self_attn.o_proj.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        measure(model, [batch])
    assert state(model) == before
    hook.remove()


@pytest.mark.parametrize("patched", [False, True])
def test_another_model_of_the_family_may_run_meanwhile(make_model, make_patched, batch, patched):
    del batch["labels"]
    model, other = make_model("llama"), (make_patched if patched else make_model)("llama", seed=1)
    expected, logits = measure(model, [batch]), other(**batch).logits
    seen = []

    def batches():
        yield batch
        seen.append(other(**batch).logits)

    measured = measure(model, batches())
    assert torch.equal(seen[0], logits)
    assert torch.equal(measured[0].squares["queries"], expected[0].squares["queries"])


def test_a_rotary_function_that_another_library_put_in_since_the_patch_is_measured_through(make_patched, batch):
    del batch["labels"]
    model = make_patched("llama")
    expected = measure(model, [batch])
    namespace, (name,) = rotary_functions(type(model.model.layers[0].self_attn))
    serving = namespace[name]
    namespace[name] = serving.__wrapped__
    try:
        measured = measure(model, [batch])
    finally:
        namespace[name] = serving
    for one, other in zip(measured, expected, strict=True):
        assert torch.equal(one.squares["queries"], other.squares["queries"])


# Batches of text

TEXTS = ["one two three four five six seven", "eight nine", "ten eleven twelve thirteen", "a"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(TEXTS, vocab_size=300)


def test_what_is_measured_does_not_depend_on_batches_or_padding(tokenizer):
    model = make_for(tokenizer)
    alone, together = (measure(model, token_batches(tokenizer, TEXTS, batch_size=size)) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens == sum(map(len, tokenizer(TEXTS)["input_ids"]))
        for states in STATES:
            torch.testing.assert_close(one.squares[states], other.squares[states], rtol=1e-4, atol=1e-5)


def make_for(tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_long_texts_are_read_in_pieces_without_losing_a_token(tokenizer):
    rows = tokenizer(TEXTS)["input_ids"]
    batches = token_batches(tokenizer, TEXTS, max_length=3, batch_size=2)
    pieces = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert [len(piece) for piece in pieces] == sorted(map(len, pieces), reverse=True)
    assert sorted(pieces) == sorted(row[start : start + 3] for row in rows for start in range(0, len(row), 3))


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("one text", {}, TypeError, "a sequence of strings, got one string"),
        ([], {}, ValueError, "no text to measure"),
        (["", ""], {}, ValueError, "no text to measure"),
        (TEXTS, {"max_length": 0}, ValueError, "^max_length must be at least 1, got 0$"),
        (TEXTS, {"batch_size": 0}, ValueError, "^batch_size must be at least 1, got 0$"),
    ],
)
def test_texts_that_cannot_be_batched_are_refused(tokenizer, texts, options, error, message):
    with pytest.raises(error, match=message):
        token_batches(tokenizer, texts, **options)


def test_nothing_to_measure_is_an_error(make_model):
    model = make_model("llama")
    padding = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    for batches in ([], [padding]):
        with pytest.raises(ValueError, match="nothing to measure"):
            measure(model, batches)


def test_a_model_that_cannot_be_patched_is_refused():
    config = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(rosa.UnsupportedModelError, match="no rotary attention"):
        measure(AutoModelForCausalLM.from_config(config), [padded_on_the_left()])


def test_padding_that_cannot_be_told_apart_is_refused():
    """BLT attends to patches of bytes."""
    model, batch = families.make_model("blt"), padded_on_the_left()
    assert measure(model, [{"input_ids": batch["input_ids"][:1]}])
    del batch["position_ids"]
    with pytest.raises(ValueError, match="padding cannot be told apart"):
        measure(model, [batch])


def test_what_road_scales_is_measured_scaled(make_model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = make_model()
    plain = measure(model, [inputs])
    rosa.patch(model, rosa.RoadConfig(1, ("q_proj",), layers=(3,)))
    torch.nn.init.constant_(model.model.layers[3].self_attn.q_proj.road.alpha, 2.0)
    found = measure(model, [inputs])
    for before, after in zip(plain, found, strict=True):
        factor = 2 if before.layer == 3 else 1
        torch.testing.assert_close(after.norms("queries"), factor * before.norms("queries"), rtol=1e-5, atol=0)
        torch.testing.assert_close(after.norms("keys"), before.norms("keys"), rtol=1e-5, atol=0)
