"""RoAd on every causal-LM family of transformers: a tiny model of each, against hooks written by hand."""

import pytest
import torch

import rosa
from rosa.adapters.road import Road
from rosa.models.linear import linear_sites
from rosa_kernels.road_reference import pairs
from tests.rosa.families import FAMILIES, find, make_model


@pytest.fixture
def ids():
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    return model(ids, use_cache=False).logits


def stir(model):
    """Gives angles and scales values, as training would."""
    generator = torch.Generator().manual_seed(7)
    for parameter in rosa.trainable_parameters(model):
        with torch.no_grad():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def eq_3_by_hand(road, h):
    """Two rows of a pair, each with its own angle and scale (variant 2)."""
    one, other = pairs(h.shape[-1], *road.pairing)
    (a1, t1), (a2, t2) = ((road.alpha[at], road.theta[at]) for at in (one, other))
    h1, h2, z = h[..., one], h[..., other], torch.empty_like(h)
    z[..., one] = a1 * t1.cos() * h1 - a1 * t1.sin() * h2
    z[..., other] = a2 * t2.sin() * h1 + a2 * t2.cos() * h2
    return z


def gradients(model, ids, parameters):
    out = logits(model, ids)
    loss = (out * torch.linspace(-1, 1, out.shape[1])[None, :, None]).square().sum()
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_is_the_model_and_eq_3(family, ids):
    if find(family).status != "supported":
        pytest.skip("not a family that RoSA adapts")
    model = make_model(family)
    before = logits(model, ids)
    for pairing in ("neighbours", "half"):
        try:
            rosa.patch(model, rosa.RoadConfig(pairing=pairing))
        except ValueError as error:  # heads of another size than the linear layers have groups of
            assert pairing == "half" and "no multiple of" in str(error)
            continue
        torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=1e-5)
        stir(model)
        parameters = rosa.trainable_parameters(model)
        ours, of_ours = logits(model, ids), gradients(model, ids, parameters)
        assert not torch.allclose(ours, before, atol=1e-3)
        roads = {site.name: site.linear.road for site in linear_sites(model) if hasattr(site.linear, "road")}
        assert all(isinstance(road, Road) for road in roads.values())
        with rosa.disabled(model):
            hooks = [
                model.get_submodule(name).register_forward_hook(lambda m, args, out, road=road: eq_3_by_hand(road, out))
                for name, road in roads.items()
            ]
            torch.testing.assert_close(logits(model, ids), ours, atol=1e-4, rtol=1e-4)
            for mine, theirs in zip(of_ours, gradients(model, ids, parameters), strict=True):
                scale = theirs.abs().max() + 1e-6
                torch.testing.assert_close(mine / scale, theirs / scale, atol=1e-3, rtol=0)
            for hook in hooks:
                hook.remove()
        rosa.unpatch(model)
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("family", "name"), [("jamba", "dt_proj"), ("longcat_flash", "classifier"), ("bamba", "out_proj")]
)
def test_layers_whose_weight_the_family_takes_itself_are_left_out_and_refused_by_name(family, name):
    model = rosa.patch(make_model(family, "meta"), rosa.RoadConfig())
    linears = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert any(key.endswith(f".{name}") for key in linears)
    assert not any(key.endswith(f".{name}") and hasattr(linear, "road") for key, linear in linears.items())
    rosa.unpatch(model)
    with pytest.raises(ValueError, match=rf"but \w+ computes with the weight of .*{name} itself"):
        rosa.patch(model, rosa.RoadConfig(targets=(name,)))


def test_layers_of_which_the_family_takes_parts_in_a_branch_of_its_own_are_adapted():
    model = rosa.patch(make_model("bloom", "meta"), rosa.RoadConfig())
    assert all(hasattr(layer.self_attention.dense, "road") for layer in model.transformer.h)


def test_layers_that_want_their_inputs_in_groups_are_none_of_the_linear_ones(ids):
    model = make_model("deepseek_v4")
    before = logits(model, ids)
    rosa.patch(model, rosa.RoadConfig())
    assert not any(hasattr(layer.self_attn.o_a_proj, "road") for layer in model.model.layers)
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=1e-5)
    stir(model)
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)
