"""`benchmarks.smollm2.variants`: a variant is RoAE but for the one thing that its name says."""

import json

import pytest
import torch

import rosa
from benchmarks.smollm2 import held_out, variants
from benchmarks.smollm2.variants import AS_IT_IS, BASES, ONE_GAIN, VARIANTS, RandomUp, Variant, changed, load, train
from rosa.adapters.pretrained import load_model
from rosa.adapters.roae import RoAE
from rosa.data.tokens import IGNORED_LABEL
from rosa.storage.settings import as_arguments
from rosa.training.finetune import finetune
from rosa.training.parsing import parse
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

CONFIG = rosa.RosaConfig(r_low=0.5, alpha=1.0, rank=32)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Options of a job of four steps on a tiny model and rows of their own."""
    folder = tmp_path_factory.mktemp("variants")
    rows = [{"instruction": f"Add {i} and {i + 1}.", "output": f"The answer is {2 * i + 1}."} for i in range(20)]
    (folder / "rows.json").write_text(json.dumps(rows))
    tokenizer = tiny_tokenizer([row["instruction"] + row["output"] for row in rows])
    tiny_model(len(tokenizer), initializer_range=0.1).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return {
        **{"model": str(folder / "base"), "data": str(folder / "rows.json"), "val_size": 4, "seed": 1, "max_steps": 4},
        **{"r_low": 0.5, "alpha": 1.0, "rank": 32, "dls": False, "learning_rate": 0.01, "norm_learning_rate": 0.001},
        **{"use_cpu": True, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"},
    }


def test_as_it_is_trains_as_the_package_does(settings, tmp_path):
    job, args = parse(as_arguments({**settings, "output": str(tmp_path / "package")}))
    trainer = finetune(job, args)
    found = train(AS_IT_IS, settings, tmp_path / "variant")
    logged = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    assert found["course"] == logged and len(logged) == 4
    assert found["validation_loss"] == trainer.evaluate()["eval_loss"]


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """The outcome of every variant's training, and its folder."""
    folders = {name: tmp_path_factory.mktemp("variant") for name in VARIANTS}
    return {name: (train(name, settings, folder), folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_is_read_again(settings, trained, name):
    plain, ids = load_model(settings["model"]), torch.arange(12).unsqueeze(0)
    untrained = plain(input_ids=ids).logits
    with changed(VARIANTS[name]):
        at_first = rosa.patch(plain, CONFIG)(input_ids=ids).logits
    assert torch.equal(at_first, untrained) != (VARIANTS[name].module is RandomUp)

    _, folder = trained[name]
    model = load(load_model(settings["model"]), folder)
    modules = [module for module in model.modules() if isinstance(module, RoAE)]
    assert len(modules) == 2 and all(type(module) is VARIANTS[name].module for module in modules)
    assert not torch.equal(model(input_ids=ids).logits, at_first)


def test_every_variant_takes_another_course(trained):
    assert len({outcome["course"][4] for outcome, _ in trained.values()}) == len(VARIANTS)


@pytest.mark.parametrize("name, times", [("up", 4.0), ("down", 0.5)])
def test_a_rate_apart_is_that_parameters_alone(settings, tmp_path, name, times):
    job, args = parse(as_arguments({**settings, "output": str(tmp_path)}))
    with changed(Variant(rates={name: times})):
        trainer = variants.job_module.finetune(job, args)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(rates) == 2 * (4 + 2) == sum(p.requires_grad for p in trainer.model.parameters())
    for parameter, rate in rates.items():
        expected = 0.001 if "norm" in parameter else 0.01 * (times if parameter.endswith(f"roae.{name}") else 1)
        assert rate == pytest.approx(expected), parameter


def adapted(variant: Variant):
    """A tiny model with an adapter that does something."""
    model = tiny_model(64, initializer_range=0.1)
    with changed(variant):
        rosa.patch(model, CONFIG)
    for module in model.modules():
        if isinstance(module, RoAE):
            torch.nn.init.normal_(module.up)
    return model.eval()


def test_one_gain_a_pair_commutes_with_a_shift_of_positions():
    ids, places = torch.randint(64, (1, 24)), torch.arange(24).unsqueeze(0)
    moved = {}
    for name in (ONE_GAIN, AS_IT_IS):
        model = adapted(VARIANTS[name])
        with torch.inference_mode():
            plain, shifted = (model(input_ids=ids, position_ids=places + s).logits for s in (0, 500))
        moved[name] = (shifted - plain).abs().max().item()
    assert moved[ONE_GAIN] < 1e-3 < 0.1 < moved[AS_IT_IS]


def test_w_gqa_begins_as_the_mean_of_a_group():
    module = next(m for m in adapted(VARIANTS["W_GQA begins as the mean of a group"]).modules() if isinstance(m, RoAE))
    S, S_K = module.signals(torch.randn(1, 3, 64))
    assert torch.allclose(S_K.unflatten(-1, (2, -1)), S.unflatten(-1, (2, 2, -1)).mean(-2), atol=1e-6)


def test_row_losses_are_those_of_the_variants_adapter(settings, trained, monkeypatch):
    rows = [
        held_out.Problem([5, 6, 7, 8], [IGNORED_LABEL, IGNORED_LABEL, 7, 8]),
        held_out.Problem([3, 9, 5], [IGNORED_LABEL, 9, 5]),
    ]
    monkeypatch.setattr(variants, "held_out", lambda model, seed: rows)
    monkeypatch.setitem(variants.COMMON, "model", settings["model"])
    _, folder = trained[ONE_GAIN]
    model = load(load_model(settings["model"]), folder)
    own = [model(input_ids=torch.tensor([r.ids]), labels=torch.tensor([r.labels])).loss.item() for r in rows]
    assert variants.row_losses(folder) == pytest.approx(own, abs=1e-4)


def test_a_variant_is_compared_with_the_first_row_by_row():
    first, second = {"row_losses": [1.0, 2.0, 3.0]}, {"row_losses": [1.5, 2.0, 4.0]}
    # Differences of 0.5, 0 and 1: their deviation is 0.5, and the error of the mean 0.5 over the root of 3.
    assert variants._above(second, first) == "+0.5000 ± 0.2887"
    for outcome, reference in ((first, first), ({"diverged": ""}, first), (first, {})):
        assert variants._above(outcome, reference) == "-"


def test_what_is_kept_was_made_with_the_settings_of_now():
    kept = [(base, name) for base in BASES for name in VARIANTS if variants.read_kept(base, name)]
    assert kept, "run `python -m benchmarks.smollm2.variants --run`"
    for base, name in kept:
        assert variants.read_kept(base, name)["settings"] == variants.settings_of(base)
        assert f"| {name} |" in variants.table()
