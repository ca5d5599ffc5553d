"""The pictures of inspection: what they show, how large they are, and the numbers beside them."""

import csv
import math

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from rosa.inspection import figures
from rosa.inspection.activations import LayerActivations, energy_shares
from rosa.inspection.course import Course
from rosa.inspection.run_figure import draw_run
from rosa.models.rotary import RotaryLayout
from rosa.selection.algorithm import Selection
from rosa.selection.log import log_entry


def layer(index, *, rotary_dim=8, width=12, keys=True, interleaved=False):
    """Four query heads and two key heads whose energy grows from element to element and from layer to layer."""
    growing = torch.arange(1.0, width + 1, dtype=torch.float64) * (index + 1)
    squares = {"queries": growing.expand(4, width)} | ({"keys": 2 * growing.expand(2, width)} if keys else {})
    return LayerActivations(
        index, f"layers.{index}.attn", RotaryLayout(rotary_dim, interleaved, "first half"), 10, squares
    )


LAYERS = [layer(0), layer(1), layer(2, rotary_dim=16, width=16), layer(3, keys=False)]
COURSE = Course(
    (0, 2, 5),
    10,
    [
        Selection(3, (0,), True, (2.0, 1.0, 0.5)),
        Selection(6, (2,), False, (3.0, 1.0, 0.0)),
        Selection(9, (5,), True, (1.0, 2.0, 4.0)),
    ],
)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_picture(path):
    """1200 pixels wide: at the 830 of a README, text of 9 points and more stays legible."""
    assert imread(path).shape[1] == 1200


@pytest.fixture(autouse=True)
def legible(monkeypatch):
    """Every text in every picture has 9 points or more, and lies within the picture."""
    save = Figure.savefig

    def check(figure, *args, **options):
        save(figure, *args, **options)
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                assert text.get_fontsize() >= 9, text.get_text()
        box = figure.get_tightbbox()
        assert box.x0 >= -0.01 and box.y0 >= -0.01, box
        assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01, box

    monkeypatch.setattr(Figure, "savefig", check)


def test_head_dimensions_with_their_pairs_stand_beside_the_picture(tmp_path):
    figures.draw_head_dimensions(LAYERS, tmp_path / "dims.png")
    check_picture(tmp_path / "dims.png")
    rows = table(tmp_path / "dims.csv")
    assert len(rows) == 2 * 24 + 32 + 12
    first = [row for row in rows if row["layer"] == "1" and row["states"] == "keys"]
    assert [row["pair"] for row in first] == ["0", "1", "2", "3"] * 2 + [""] * 4  # the last four are not rotated
    assert [float(row["norm"]) for row in first] == pytest.approx([math.sqrt(4 * i / 10) for i in range(1, 13)])


def test_pairs_of_interleaved_heads_are_neighbours(tmp_path):
    figures.draw_head_dimensions([layer(0, interleaved=True)], tmp_path / "dims.png")
    rows = [row["pair"] for row in table(tmp_path / "dims.csv") if row["states"] == "queries"]
    assert rows == ["0", "0", "1", "1", "2", "2", "3", "3"] + [""] * 4


def test_layers_are_the_mean_of_the_head_dimensions(tmp_path):
    figures.draw_layers(LAYERS, tmp_path / "layers.png")
    check_picture(tmp_path / "layers.png")
    rows = table(tmp_path / "layers.csv")
    assert [(row["layer"], row["states"]) for row in rows] == [
        *((str(i), "queries") for i in range(4)), *((str(i), "keys") for i in range(3))
    ]  # fmt: skip
    assert float(rows[0]["mean_norm"]) == pytest.approx(sum(math.sqrt(i / 10) for i in range(1, 13)) / 12)


def test_energy_shares_stand_beside_the_picture(tmp_path):
    shares = energy_shares(LAYERS, [0.25, 0.5, 1.0])
    figures.draw_energy_shares(shares, tmp_path / "share.png")
    check_picture(tmp_path / "share.png")
    rows = table(tmp_path / "share.csv")
    assert [row["layer"] for row in rows] == ["all", "0", "1", "2", "3"] * 3
    assert [float(row["both"]) for row in rows] == [share.both for share in shares]
    assert rows[4]["keys"] == ""


def test_models_that_rotate_queries_alone_can_be_drawn(tmp_path):
    alone = [layer(0, keys=False)]
    figures.draw_head_dimensions(alone, tmp_path / "dims.png")
    figures.draw_layers(alone, tmp_path / "layers.png")
    figures.draw_energy_shares(energy_shares(alone, [0.5, 1.0]), tmp_path / "share.png")


def test_a_course_is_drawn_with_its_selections_and_counts_beside_it(tmp_path):
    figures.draw_course(COURSE, tmp_path / "course.png")
    check_picture(tmp_path / "course.png")
    rows = [tuple(map(int, row.values())) for row in table(tmp_path / "course.csv")]
    assert rows[:4] == [(3, 0, 1, 1), (3, 2, 0, 1), (3, 5, 0, 1), (6, 0, 0, 0)]
    counts = [tuple(map(int, row.values())) for row in table(tmp_path / "course_counts.csv")]
    assert counts == [(0, 1, 0, 1), (2, 0, 1, 1), (5, 1, 0, 1)]


def test_the_map_colours_a_layer_from_its_selection_to_the_next():
    axes = Figure().subplots()
    figures.draw_selections(axes, COURSE.history, COURSE.layers, COURSE.steps)
    mesh = axes.collections[0]
    colours = [[to_hex(colour) for colour in row] for row in mesh.cmap(mesh.norm(mesh.get_array()))]
    everything, scored, random, frozen = map(
        to_hex, (figures.ALL_LAYERS, figures.BY_SCORE, figures.AT_RANDOM, figures.FROZEN)
    )
    assert colours == [
        [everything, scored, frozen, frozen],
        [everything, frozen, random, frozen],
        [everything, frozen, frozen, scored],
    ]
    assert sorted({x for x, _ in mesh.get_coordinates()[0]}) == [0.5, 2.5, 5.5, 8.5, 10.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "5"]


@pytest.mark.parametrize("layers", [1, 28, 100])
def test_runs_of_few_layers_and_of_many_are_legible(tmp_path, layers):
    history = [
        Selection(step, tuple(range(0, layers, 2)), step % 80 == 0, (0.5,) * layers) for step in range(40, 4000, 40)
    ]
    course = Course(tuple(range(layers)), 4000, history)
    figures.draw_course(course, tmp_path / "course.png")
    figures.draw_scores(course, tmp_path / "scores.png")


def test_scores_stand_beside_their_picture(tmp_path):
    figures.draw_scores(COURSE, tmp_path / "scores.png")
    check_picture(tmp_path / "scores.png")
    rows = [tuple(map(float, row.values())) for row in table(tmp_path / "scores.csv")]
    assert rows == [
        (made.step, index, score)
        for made in COURSE.history
        for index, score in zip((0, 2, 5), made.scores, strict=True)
    ]


def test_scores_that_are_all_zero_can_be_drawn(tmp_path):
    figures.draw_scores(Course((0, 1), 5, [Selection(3, (0,), True, (0.0, 0.0))]), tmp_path / "scores.png")


LOG = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step} for step in (2, 4, 6, 8, 10)]


@pytest.mark.parametrize("layers", [0, 2, 60])
def test_a_run_is_drawn_with_what_it_has(tmp_path, layers):
    """Rows that are held out and a selection of layers, if it has them."""
    made = Selection(5, tuple(range(1, layers)), True, (1.0,) * layers)
    selected = [{"step": 5, **log_entry(made, tuple(range(layers)))}] if layers else []
    held_out = [{"step": step, "eval_loss": 2 / step} for step in (5, 10)] if layers != 2 else []
    assert draw_run([*LOG, *selected, *held_out], tmp_path / "train.png")
    check_picture(tmp_path / "train.png")


def test_the_panels_of_a_run_show_its_log(tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: panels.extend(figure.axes))
    made = Selection(5, (1,), False, (1.0, 2.0))
    log = [*LOG, {"step": 5, **log_entry(made, (0, 1))}, {"step": 6, "eval_loss": 1.5}, {"step": 10, "train_loss": 1}]
    assert draw_run(log, tmp_path / "train.png")
    (training, held_out), (rate,) = (panel.get_lines() for panel in panels[:2])
    assert training.get_xydata().tolist() == [[entry["step"], entry["loss"]] for entry in LOG]
    assert held_out.get_xydata().tolist() == [[6, 1.5]]
    assert rate.get_xydata().tolist() == [[entry["step"], entry["learning_rate"]] for entry in LOG]
    mesh = panels[2].collections[0]
    colours = [[to_hex(colour) for colour in row] for row in mesh.cmap(mesh.norm(mesh.get_array()))]
    every, random, frozen = map(to_hex, (figures.ALL_LAYERS, figures.AT_RANDOM, figures.FROZEN))
    assert colours == [[every, frozen], [every, random]]


def test_a_run_of_a_single_loss_has_no_course(tmp_path):
    assert not draw_run([LOG[0], {"step": 2, "train_loss": 1.0}], tmp_path / "train.png")
    assert not (tmp_path / "train.png").exists()


def test_k_ratio_is_drawn_in_its_order_with_error_bars(tmp_path):
    points = [(1.0, 62.5, 1.0), (0.1, 60.0, 1.5), (0.5, 63.0, 0.5)]
    figures.draw_k_ratio(iter(points), tmp_path / "k.png")
    check_picture(tmp_path / "k.png")
    assert [tuple(map(float, row.values())) for row in table(tmp_path / "k.csv")] == sorted(points)
    with pytest.raises(ValueError, match="no points"):
        figures.draw_k_ratio([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
