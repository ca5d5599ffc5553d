"""The page for developers adds a third rotary adapter: it is attached, trained, selected, saved and loaded like the two
that are there, by the page's own code."""

import sys
import types
from pathlib import Path

import pytest
import torch

import rosa
from rosa.adapters.card import PAPERS
from rosa.adapters.plan import METHODS
from tests.rosa.conftest import make_model

PAGE = Path(__file__).parents[3] / "docs" / "development.md"


@pytest.fixture
def temperature(monkeypatch):
    """The configuration that the page's code defines, registered for the time of a test."""
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where dataclasses look for it
    monkeypatch.setitem(METHODS, "temperature", None)  # taken out again after the test
    monkeypatch.setitem(PAPERS, "temperature", None)
    exec(code, page.__dict__)
    return page.TemperatureConfig


@pytest.fixture
def batch():
    return {"input_ids": torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_the_adapter_of_the_page_does_what_it_says(temperature, batch, tmp_path):
    model = make_model()
    base = logits(model, batch)
    rosa.patch(model, temperature(layers=(0, 2)))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"scale"}
    torch.testing.assert_close(logits(model, batch), base, atol=1e-6, rtol=1e-5)

    # twice the queries of layer 0: the base with twice the weights
    twice = make_model()
    attention = twice.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight *= 2
        if attention.q_proj.bias is not None:
            attention.q_proj.bias *= 2
        model.model.layers[0].self_attn.temperature.scale.fill_(2.0)
    torch.testing.assert_close(logits(model, batch), logits(twice, batch), atol=1e-6, rtol=1e-5)

    rosa.save_adapter(model, tmp_path / "out")
    loaded = rosa.load_adapter(make_model(), tmp_path / "out")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    with rosa.disabled(model):
        assert torch.equal(logits(model, batch), base)
    rosa.patch(model, rosa.RoadConfig(), "second")
    rosa.set_adapter(model, "default")
    assert torch.equal(logits(model, batch), logits(loaded, batch))
    assert torch.equal(logits(rosa.unpatch(model), batch), base)


def test_the_adapter_of_the_page_trains_under_layer_selection(temperature, batch):
    model = rosa.patch(make_model(), temperature())
    optimizer = torch.optim.SGD(rosa.trainable_parameters(model), lr=0.1)
    selection = rosa.DynamicLayerSelection(optimizer, model, k_ratio=0.5, interval=1, p_exploit=1.0, score="adapter")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):  # a gradient, a selection, and a step of the layers selected
        model(**batch, labels=batch["input_ids"]).loss.backward()
        selection.step()
        selection.zero_grad()
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert len(selection.selected_layers) == 2 and moved
