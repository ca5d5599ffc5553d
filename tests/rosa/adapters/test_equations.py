"""Patched models against an independent, direct writing of Eq. 2, 3 and 4 into a copy of the model."""

import copy
import functools
import inspect
import types

import pytest
import torch

import rosa


def write_equations_into(model, alpha):
    """Rewrites each attention of a patched model by hand: no op, no reference, no hook of RoSA is left in the path."""
    plain = rosa.unpatch(copy.deepcopy(model))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".roae." not in k})
    weights = {}
    for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
        roae, attention = ours.self_attn.roae, theirs.self_attn
        own = {n: p.detach().clone().requires_grad_() for n, p in roae.named_parameters()}
        weights |= {f"{id(attention)}.{n}": p for n, p in own.items()}
        attention.register_forward_pre_hook(remember_input, with_kwargs=True)
        for norm in ours.named_children():
            if "norm" in norm[0]:
                getattr(theirs, norm[0]).weight.requires_grad_(True)
        replace_rope(attention, own, alpha)
    return plain, weights


def remember_input(attention, args, kwargs):
    attention.H = kwargs["hidden_states"]


def replace_rope(attention, w, alpha):
    """Gives this one attention module a forward of its own with `apply_rotary_pos_emb` replaced by Eq. 2 to 4."""
    forward = inspect.unwrap(type(attention).forward)

    def rope(q, k, cos, sin):
        def rotate_half(x):
            a, b = x.chunk(2, dim=-1)
            return torch.cat((-b, a), dim=-1)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        S = torch.nn.functional.silu(attention.H @ w["down"].T @ w["up"].T)  # Eq. 2
        S_K = S @ w["gqa_down"].T @ w["gqa_up"].T if "gqa_down" in w else S  # Eq. 3
        out = []
        for x, s in ((q, S), (k, S_K)):
            x = x * cos + rotate_half(x) * sin
            heads, half = x.shape[1], x.shape[-1] // 2
            s = s.unflatten(-1, (heads, -1)).transpose(1, 2)
            n = s.shape[-1] // 2
            gain = torch.ones_like(x)
            gain[..., half - n : half] = 1 + alpha * s[..., :n]
            gain[..., 2 * half - n :] = 1 + alpha * s[..., n:]
            out.append(x * gain)  # Eq. 4
        return out

    own_globals = {**forward.__globals__, "apply_rotary_pos_emb": rope}
    own_forward = types.FunctionType(
        forward.__code__, own_globals, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own_forward.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = functools.partial(own_forward, attention)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[2, 4], ids=["grouped", "as many key heads"])
def patched(request, family, make_patched):
    config = rosa.RosaConfig(rank=4, r_low=0.5, alpha=0.3, adapter_dtype="float64")
    return make_patched(family, config=config, dtype=torch.float64, num_key_value_heads=request.param).train()


def test_logits_and_every_gradient_are_those_of_the_equations(patched, batch):
    # Padded on the right: Gemma-2's eager attention in float64 is NaN, unpatched too, where all is masked.
    batch = {name: t.flip(1) for name, t in batch.items()}
    plain, weights = write_equations_into(patched, alpha=0.3)
    plain.train()
    torch.testing.assert_close(patched(**batch).logits, plain(**batch).logits)

    ours = gradients(patched, batch)
    theirs = gradients(plain, batch)
    for layer_ours, layer_theirs in zip(patched.model.layers, plain.model.layers, strict=True):
        for name, parameter in layer_ours.self_attn.roae.named_parameters():
            torch.testing.assert_close(parameter.grad, weights[f"{id(layer_theirs.self_attn)}.{name}"].grad)
    norms = [name for name in ours if ".roae." not in name]
    assert len(norms) == 4 * (4 if "gemma" in type(patched).__name__.lower() else 2)
    for name in norms:
        torch.testing.assert_close(ours[name], theirs[name])
    assert all(".roae." in name or name in norms for name in ours)  # the frozen base gets no gradient


def test_a_fresh_patch_computes_what_the_model_computed_bitwise(family, make_model, batch):
    model = make_model(family).eval()
    before = model(**batch).logits
    rosa.patch(model)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fresh_patch_in_16_bits_is_no_further_from_float64_than_the_model_was(family, make_model, dtype):
    model = make_model(family, dtype=dtype)
    attention = model.model.layers[0].self_attn
    q, k = torch.randn(2, 2, 4, 33, 16).to(dtype)
    cos, sin = model.model.rotary_emb(q, torch.arange(33)[None])
    rope = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    exact = rope(q.double(), k.double(), cos.double(), sin.double())
    before = rope(q, k, cos, sin)

    roae = rosa.patch(model).model.layers[0].self_attn.roae
    after = roae(q, k[:, :2], cos, sin, torch.randn(2, 33, 32).to(dtype))
    for e, b, a in zip(exact, before, after, strict=True):
        e, b = e[:, : a.shape[1]], b[:, : a.shape[1]]
        assert 0 < (a.double() - e).norm() < (b.double() - e).norm()  # one rounding where eager RoPE has three


def test_a_fresh_patch_in_16_bits_gives_logits_as_near_to_float64_as_the_model_did(family, make_model):
    before = after = 0.0  # squared errors, over models: the roundings of one model's other layers are larger
    for seed in range(10):
        ids = torch.randint(3, 96, (2, 33), generator=torch.Generator().manual_seed(seed))
        model = make_model(family, dtype=torch.bfloat16, seed=seed).eval()
        exact = copy.deepcopy(model).double()(ids).logits
        before += (model(ids).logits.double() - exact).square().sum().item()
        after += (rosa.patch(model)(ids).logits.double() - exact).square().sum().item()
    assert after < 1.02 * before


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(family, make_patched, batch, reentrant):
    model = make_patched(family).train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = gradients(model, batch)
    assert checkpointed.keys() == plain.keys()
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_no_grad_gives_the_same_logits_and_no_graph(family, make_patched, batch):
    model = make_patched(family).eval()
    with torch.no_grad():
        logits = model(**batch).logits
    assert not logits.requires_grad and torch.equal(logits, model(**batch).logits)


def test_padding_does_not_change_a_row(family, make_patched, batch):
    model = make_patched(family).eval()
    padded = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[1, 4:]
    positions = torch.arange(7)[None]
    alone = model(batch["input_ids"][1:, 4:], position_ids=positions).logits[0]
    torch.testing.assert_close(padded, alone, atol=2e-4, rtol=1e-3)


def test_generation_with_cache_equals_generation_without(family, make_patched, batch):
    model = make_patched(family).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with_cache, without = (
        model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_triton_backend_in_a_model(family, make_patched, batch, monkeypatch, kernel_device):
    model = make_patched(family).train().to(kernel_device)
    inputs = {name: t.to(kernel_device) for name, t in batch.items()}
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    expected = gradients(model, inputs)
    monkeypatch.setenv("ROSA_BACKEND", "triton")
    for name, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4)
