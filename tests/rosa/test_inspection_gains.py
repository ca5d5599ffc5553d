"""Measured gains against what RoAE does to the rotated queries and keys."""

import csv

import pytest
import torch

import rosa
from rosa.adapters.roae import RoAE
from rosa.inspection.activations import measure
from rosa.inspection.gains import LayerGains, _by_head, draw_gains, gains_table, measure_gains

TOKENS = {"input_ids": torch.tensor([[5, 9, 12, 7, 3], [4, 8, 2, 2, 2]]), "attention_mask": torch.ones(2, 5).long()}
TOKENS["attention_mask"][1, 3:] = 0


@pytest.fixture
def patched(make_patched, stir):
    model = make_patched()
    stir(model)
    return model


def test_the_gain_of_a_token_is_the_ratio_to_plain_rope(patched):
    """In the first layer, whose input does not depend on alpha; one token, so that the mean is its gain."""
    token = {"input_ids": torch.tensor([[7]])}
    (gains, *_), (enhanced, *_) = measure_gains(patched, [token]), measure(patched, [token])
    for module in patched.modules():
        if isinstance(module, RoAE):
            module.alpha = 0.0
    plain = measure(patched, [token])[0]
    assert gains.tokens == 1
    for states, mean in gains.mean.items():
        pairs = mean.shape[-1]
        ratio = (enhanced.squares[states] / plain.squares[states]).sqrt()[:, enhanced.by_pair]
        real, imaginary = ratio.view(len(ratio), -1, 2)[:, -pairs:].unbind(-1)
        torch.testing.assert_close(mean.abs(), torch.stack([real, imaginary], 1), rtol=1e-4, atol=1e-5)
        assert (mean != 1).all() and torch.equal(gains.least[states], gains.greatest[states])
        assert not gains.deviation[states].any()


def test_padding_and_batches_do_not_count(patched):
    both = measure_gains(patched, [TOKENS])
    rows = [{"input_ids": TOKENS["input_ids"][:1]}, {"input_ids": TOKENS["input_ids"][1:, :3]}]
    apart = measure_gains(patched, rows)
    assert {one.tokens for one in both + apart} == {8}
    for one, other in zip(both, apart, strict=True):
        for name in ("mean", "deviation", "least", "greatest"):
            for states in ("queries", "keys"):
                torch.testing.assert_close(
                    getattr(one, name)[states], getattr(other, name)[states], rtol=1e-4, atol=1e-5
                )


def test_a_fresh_adapter_changes_nothing(make_model):
    for one in measure_gains(rosa.patch(make_model()), [TOKENS]):
        assert all((extreme == 1).all() for part in (one.least, one.greatest) for extreme in part.values())


def test_the_table_and_the_picture_hold_the_numbers(patched, tmp_path):
    layers = measure_gains(patched, [TOKENS])
    lines = gains_table(layers).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["queries", "keys"]
    distances = [(one.mean["queries"] - 1).abs().mean().item() for one in layers]
    assert f"{sum(distances) / len(layers):.4f}" in lines[2]
    draw_gains(layers, tmp_path / "gains.png")
    rows = list(csv.DictReader((tmp_path / "gains.csv").open()))
    assert len(rows) == sum(mean.numel() for one in layers for mean in one.mean.values())
    first = rows[0]
    assert (first["layer"], first["states"], first["head"], first["part"], first["pair"]) == (
        "0", "queries", "0", "real", "0",
    )  # fmt: skip
    assert float(first["mean"]) == pytest.approx(layers[0].mean["queries"][0, 0, 0].item(), rel=1e-5)


def test_each_head_stands_at_its_layer_and_a_single_one_is_drawn(tmp_path):
    gains = {"queries": 1 + torch.tensor([0.1, -0.3]).double().expand(3, 2, 2), "keys": torch.ones(1, 2, 2).double()}
    layer = LayerGains(2, 1, gains, gains, gains, gains)
    found = _by_head([layer], "queries")
    assert found.shape == (3, 3) and found[:, :2].isnan().all()
    torch.testing.assert_close(found[:, 2], torch.full((3,), 0.2, dtype=torch.float64))
    draw_gains([layer], tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 1000


def test_layers_of_other_sizes_are_drawn_together(tmp_path):
    def layer(index, heads, pairs):
        gains = {states: torch.full((heads, 2, pairs), 1.1).double() for states in ("queries", "keys")}
        return LayerGains(index, 1, gains, gains, gains, gains)

    layers = [layer(0, 4, 2), layer(1, 2, 4), layer(2, 4, 2)]  # as Gemma 4's, of two head sizes
    assert _by_head(layers, "keys").isnan().sum(0).tolist() == [0, 2, 0]
    draw_gains(layers, tmp_path / "gains.png")
    assert len(list(csv.DictReader((tmp_path / "gains.csv").open()))) == 2 * sum((16, 16, 16))


def test_a_model_without_roae_and_a_switched_off_one_are_refused(make_model, patched):
    for model in (make_model(), rosa.patch(make_model(), rosa.RoadConfig())):
        with pytest.raises(ValueError, match="carries no adapter of RoSA"):
            measure_gains(model, [TOKENS])
    with rosa.disabled(patched), pytest.raises(ValueError, match="carries no adapter of RoSA"):
        measure_gains(patched, [TOKENS])
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_gains(patched, [])
