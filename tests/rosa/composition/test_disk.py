"""Compositions on disk: what is saved comes back, what does not fit is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rosa
from tests.rosa.composition.test_compose import TASKS, make_composed
from tests.rosa.conftest import make_model

WEIGHTS, DESCRIPTION = "composition.safetensors", "composition.json"


@pytest.fixture
def saved(tmp_path):
    model = make_composed(tasks={"form": 3, "skill": 13}, layers=(1, 3), positions=2)
    rosa.save_composition(model, tmp_path / "out")
    return model, tmp_path / "out"


def edit(folder, change):
    """Rewrites the description and the tensors of a saved composition."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        description = json.loads(file.metadata()["composition"])
    tensors = load_file(folder / WEIGHTS)
    change(description, tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"composition": json.dumps(description)})


def test_a_fresh_model_with_the_composition_is_the_model_that_was_saved(saved):
    model, folder = saved
    fresh = make_model("llama").eval()
    assert rosa.load_composition(fresh, folder) is fresh
    ids = torch.arange(3, 12)[None]
    for tasks in ((), ("form",), ("skill",), TASKS):
        with rosa.use_tasks(model, *tasks), rosa.use_tasks(fresh, *tasks):
            assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == list(rosa.composition_parameters(fresh))


def test_the_folder_says_how_the_model_is_divided(saved):
    assert json.loads((saved[1] / DESCRIPTION).read_text()) == {
        "format_version": 1, "base_model_name_or_path": None, "revision": None, "shares": {"form": 3, "skill": 13},
        "layers": [1, 3], "positions": 2, "width": 32, "depth": 4,
    }  # fmt: skip
    assert {n: tuple(t.shape) for n, t in load_file(saved[1] / WEIGHTS).items()} == {
        f"layers.{n}.{name}": (16,) for n in (1, 3) for name in ("theta", "alpha")
    }


def test_saving_again_replaces_what_was_there(saved):
    model, folder = saved
    with torch.no_grad():
        next(iter(rosa.composition_parameters(model).values())).fill_(0.5)
    rosa.save_composition(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, WEIGHTS]
    assert load_file(folder / WEIGHTS)["layers.1.theta"].eq(0.5).all()


def shares(description, tensors):
    description["shares"] = {"form": 3, "skill": 14}


def no_layers(description, tensors):
    description["layers"] = None


def version(description, tensors):
    description["format_version"] = 2


def no_width(description, tensors):
    del description["width"]


def one_number_less(description, tensors):
    tensors["layers.1.theta"] = tensors["layers.1.theta"][1:].clone()


def no_alpha(description, tensors):
    del tensors["layers.3.alpha"]


def another(description, tensors):
    tensors["layers.2.alpha"] = torch.ones(16)


def not_finite(description, tensors):
    tensors["layers.3.alpha"][2] = torch.nan


@pytest.mark.parametrize(
    "change, message",
    [
        (shares, "unusable description: the tasks' shares must be whole numbers above 0 with the sum 16"),
        (no_layers, "unusable description: .*layers is None"),
        (version, "format version 2, this RoSA reads 1"),
        (no_width, "does not say width"),
        (one_number_less, r"layers.1.theta is torch.float32 \[15\], expected numbers \[16\]"),
        (no_alpha, "layers.3.alpha is missing"),
        (another, "layers.2.alpha has no place in the model"),
        (not_finite, "layers.3.alpha holds values that are not finite"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(saved, change, message):
    edit(saved[1], change)
    model = make_model("llama")
    with pytest.raises(rosa.AdapterError, match=message):
        rosa.load_composition(model, saved[1])
    assert not rosa.is_composed(model) and all(p.requires_grad for p in model.parameters())


def test_files_that_are_none_are_refused(saved, tmp_path):
    (saved[1] / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(rosa.AdapterError, match="truncated or no safetensors file"):
        rosa.load_composition(make_model("llama"), saved[1])
    save_file({"x": torch.ones(1)}, saved[1] / WEIGHTS)
    with pytest.raises(rosa.AdapterError, match="carries no description of a composition"):
        rosa.load_composition(make_model("llama"), saved[1])
    with pytest.raises(FileNotFoundError, match="holds no composition: composition.safetensors is missing"):
        rosa.load_composition(make_model("llama"), tmp_path)


@pytest.mark.parametrize("changes, name", [({"hidden_size": 64}, "width"), ({"num_hidden_layers": 3}, "depth")])
def test_a_model_of_another_shape_is_refused(saved, changes, name):
    model = make_model("llama", **changes)
    with pytest.raises(rosa.AdapterError, match=f"made for another model: its {name} is"):
        rosa.load_composition(model, saved[1])
    assert not rosa.is_composed(model)


def test_a_composed_model_is_not_composed_again(saved):
    model = make_composed()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="is composed already"):
        rosa.load_composition(model, saved[1])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_cannot_be_used_again_is_not_saved(saved, tmp_path):
    model, folder = saved
    kept = (folder / WEIGHTS).read_bytes()
    next(iter(rosa.composition_parameters(model).values())).data[0] = torch.inf
    with pytest.raises(FloatingPointError, match="layers.1.theta holds values that are not finite"):
        rosa.save_composition(model, folder)
    assert (folder / WEIGHTS).read_bytes() == kept
    make_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model"):
        rosa.save_composition(make_composed(), tmp_path / "model")
    with pytest.raises(ValueError, match="is not composed"):
        rosa.save_composition(make_model("llama"), tmp_path / "new")
