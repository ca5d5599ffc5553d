"""The angles and scales of a RoAd adapter, read from its folder: numbers, table, picture, and what has none."""

import csv
import re

import pytest
import torch

import rosa
from rosa.cli import main
from rosa.inspection.angles import draw_turns, read_turns, turns_table


@pytest.fixture
def adapter(make_model, tmp_path):
    """The folder of an adapter of two layers that turns layer 1 by 0.1 and layer 3 by -0.3, but for one angle of 2, and
    scales by 0.5 and 1.25."""
    model = rosa.patch(make_model(), rosa.RoadConfig(1, ("q_proj", "down_proj"), layers=(1, 3)))
    for name, parameter in model.named_parameters():
        if ".road." in name:
            values = {"1.theta": 0.1, "3.theta": -0.3, "1.alpha": 0.5, "3.alpha": 1.25}
            torch.nn.init.constant_(parameter, values[f"{name.split('.')[2]}.{name.split('.')[-1]}"])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.road.theta[3] = 2.0
    rosa.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_angles_and_scales_are_told_by_layer_and_kind_of_linear_layer(adapter):
    turns = read_turns(adapter)
    assert [turn[:2] for turn in turns] == [(n, name) for n in (1, 3) for name in ("mlp.down_proj", "self_attn.q_proj")]
    down, query = (turn for turn in turns if turn.layer == 1)
    assert down[2:] == pytest.approx((0.1, 0.1, 0.5, 0.5))
    assert query[2:] == pytest.approx(((31 * 0.1 + 2) / 32, 2.0, 0.5, 0.5))  # of 32 pairs
    assert turns[-1][2:] == pytest.approx((0.3, 0.3, 0.25, 0.25))


def test_the_table_has_a_row_for_each_kind_and_names_the_extreme_layers(adapter):
    *_, down, query = turns_table(read_turns(adapter)).splitlines()
    assert re.fullmatch(r"mlp.down_proj +0.2000 +0.3000 +0.3750 +0.5000 +0.1000 \(layer 1\) +0.3000 \(layer 3\)", down)
    assert query.split()[:3] == ["self_attn.q_proj", f"{(0.3 + (31 * 0.1 + 2) / 32) / 2:.4f}", "2.0000"]


def test_a_fresh_adapter_is_the_identity(make_model, tmp_path):
    rosa.save_adapter(rosa.patch(make_model(), rosa.RoadConfig(variant=4, layers=(2,))), tmp_path)
    turns = read_turns(tmp_path)
    assert len(turns) == 7 and all(turn[2:] == (0, 0, 0, 0) for turn in turns)
    draw_turns(turns, tmp_path / "angles.png")  # of one layer


def test_the_command_prints_the_table_and_draws(adapter, tmp_path, capsys):
    main(["inspect", "--adapter", str(adapter), "--output", str(tmp_path / "out")])
    assert turns_table(read_turns(adapter)) in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "angles.csv").open()))
    assert len(rows) == 4 and rows[0]["linear"] == "mlp.down_proj" and float(rows[0]["scale"]) == 0.5
    assert (tmp_path / "out" / "angles.png").stat().st_size > 1000


def test_what_has_no_angles_says_what_to_do(adapter, make_patched, tmp_path, capsys):
    rosa.save_adapter(make_patched(), tmp_path / "rosa")
    with pytest.raises(ValueError, match="is of RoSA, which has no angles to show: give --model"):
        read_turns(tmp_path / "rosa")
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        read_turns(tmp_path / "nowhere")
    for options, message in (
        ([], "one of the arguments --model --run --adapter is required"),
        (["--adapter", str(adapter), "--r-low", "0.5"], "--r-low: not allowed without argument --model"),
        (["--adapter", str(adapter), "--run", "x"], "--adapter: not allowed with argument --run"),
    ):
        with pytest.raises(SystemExit):
            main(["inspect", *options, "--output", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
