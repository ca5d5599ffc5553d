"""`benchmarks.smollm2.position`: its document has the kept figures, which are of shifts and places alone."""

import pytest
import torch

import rosa
from benchmarks.document import fill
from benchmarks.smollm2 import position, position_tables
from benchmarks.smollm2.held_out import Problem, losses, response_logits
from benchmarks.smollm2.position import by_place, long_rows, seed_of, shifted
from benchmarks.smollm2.variants import AS_IT_IS, COMMON, ONE_GAIN, VARIANT_NAME, VARIANTS, changed
from rosa.adapters.roae import RoAE
from rosa.data.tokens import IGNORED_LABEL
from rosa.training.methods import attach
from tests.rosa.tiny_qwen2 import tiny_model

VOCABULARY = 64


def test_the_document_has_what_the_figures_give():
    text = position_tables.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, position_tables.parts()), "run `python -m benchmarks.smollm2.position`"


@pytest.mark.parametrize("seed", position_tables.RUNS.values())
def test_every_model_was_measured_alike(seed):
    kept = [model for model in position_tables.kept() if model["seed"] == seed]
    assert kept[0]["name"] == position_tables.BASE and kept[0]["adapter"] is None
    for model in kept:
        assert [found["shift"] for found in model["shifts"]] == list(position.SHIFTS)
        assert model["dtype"] == "float32" and model["versions"] == kept[0]["versions"]
        places = [(problem["at"], problem["tokens"]) for problem in model["places"]]
        assert places == [(problem["at"], problem["tokens"]) for problem in kept[0]["places"]]


def test_what_an_adapter_has_not_learnt_is_told_by_its_runs_seed(tmp_path):
    with pytest.raises(ValueError, match=r"is no run of `rosa compare` or .* its seed is not known"):
        seed_of(tmp_path)
    (tmp_path / "training.json").write_text('{"seed": 2333}')
    assert seed_of(tmp_path) == 2333
    (tmp_path / VARIANT_NAME).touch()
    assert seed_of(tmp_path) == COMMON["seed"]


def problem(prompt: int, response: int) -> Problem:
    ids = torch.randint(VOCABULARY, (prompt + response,)).tolist()
    return Problem(ids, [IGNORED_LABEL] * prompt + ids[prompt:])


@pytest.fixture
def problems():
    return [problem(5, 7), problem(3, 2), problem(8, 4), problem(4, 9)]


@pytest.fixture
def base():
    return tiny_model(VOCABULARY, initializer_range=0.1).eval()


def adapted(base, name):
    """The base with a RoAE that does something."""
    with changed(VARIANTS[name]):
        rosa.patch(base, rosa.RosaConfig(r_low=0.5, alpha=1.0, rank=32))
    for module in base.modules():
        if isinstance(module, RoAE):
            torch.nn.init.normal_(module.up)
    return base


def test_long_rows_are_of_whole_problems(problems):
    first, second, third, _ = problems
    assert long_rows(problems, 2, 17) == [[first, second], [third]]
    assert long_rows(problems, 1, 30) == [[first, second, third]]
    with pytest.raises(ValueError, match="do not fill 2 rows of 30 tokens"):
        long_rows(problems, 2, 30)


def test_logits_are_those_that_predict_the_response(base, problems):
    ids = torch.tensor([problems[0].ids + problems[1].ids])
    wanted = [*range(5, 12), *range(15, 17)]
    logits, labels = response_logits(base, problems[:2])
    assert torch.equal(labels, ids[0, wanted])
    expected = base(input_ids=ids).logits[0, [at - 1 for at in wanted]]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_losses_are_the_models_own(base, problems):
    (alone,) = losses(base, problems[:1])
    own = base(input_ids=torch.tensor([problems[0].ids]), labels=torch.tensor([problems[0].labels])).loss
    assert alone == pytest.approx(own.item(), rel=1e-5)
    in_row = losses(base, problems)
    assert len(in_row) == 4 and in_row[0] == pytest.approx(alone, rel=1e-5)
    assert in_row[1] != pytest.approx(losses(base, problems[1:2])[0], rel=1e-3)  # it sees the one before it


def test_through_peft_it_is_the_same(base, problems):
    plain = losses(base, problems, 7)
    assert losses(attach(base, "lora").eval(), problems, 7) == pytest.approx(plain, rel=1e-5)


def test_a_shift_moves_roae_and_no_model_that_sees_distances_alone(base, problems):
    (of_base,) = shifted(base, problems, [300])
    (of_one_gain,) = shifted(adapted(tiny_model(VOCABULARY, initializer_range=0.1).eval(), ONE_GAIN), problems, [300])
    near, far = shifted(adapted(base, AS_IT_IS), problems, [2, 300])
    for found in (of_base, of_one_gain):
        assert found["largest_change"] < 1e-3 and abs(found["divergence"]) < 1e-8
        assert found["loss"] == pytest.approx(found["loss_shifted"], abs=1e-4)
    assert 1e-3 < near["mean_change"] < far["mean_change"] < far["largest_change"]
    assert far["divergence"] > 1e-4 and far["loss"] == near["loss"] != far["loss_shifted"]
    assert far["loss"] == pytest.approx(_weighted_loss(base, problems), rel=1e-5)


def _weighted_loss(model, problems):
    sizes = [sum(label != IGNORED_LABEL for label in p.labels) for p in problems]
    return sum(losses(model, [p])[0] * size for p, size in zip(problems, sizes, strict=True)) / sum(sizes)


def test_places_are_those_of_the_long_row(base, problems):
    model = adapted(base, AS_IT_IS)
    found = by_place(model, [problems[:2], problems[2:]])
    assert [(f["at"], f["tokens"]) for f in found] == [(0, 7), (12, 2), (0, 4), (12, 9)]
    assert [f["in_row"] for f in found] == losses(model, problems[:2]) + losses(model, problems[2:])
    assert [[f["alone"]] for f in found] == [losses(model, [p]) for p in problems]
    assert [[f["alone_there"]] for f in found] == [losses(model, [p], 12 * (i % 2)) for i, p in enumerate(problems)]


def test_the_tables_tell_the_differences_to_the_base():
    def model(name, gain, shift):
        places = [
            {"at": at, "tokens": 5, "in_row": 1.0 + gain * at, "alone": 1.0 + gain, "alone_there": 1.0 + shift}
            for at in (0, 200, 300, 900, 1500, 2000, 2500, 3000, 3100, 4000)
        ]
        shifts = [
            {
                "shift": s,
                "largest_change": 9e-1,
                "mean_change": shift,
                "divergence": 1e-3,
                "loss": 1.5,
                "loss_shifted": 2,
            }
            for s in position.SHIFTS
        ]
        return {"name": name, "adapter": None, "shifts": shifts, "places": places}

    base, other = model("base", 0.0, 0.0), model("other", -0.001, 0.1)
    places = position_tables._places([base, other])
    assert "0 to 256 (2)" in places and "| other | -0.100 ± 0.100 / -0.001 ± 0.000 | -0.600 ± 0.300 / " in places
    # Each problem by as much: 1 + 0.1 - (1 - 0.001).
    assert "| other | +1.0e-01 ± 0e+00 | +1.0e-01 ± 0e+00 |" in position_tables._alone([base, other])
