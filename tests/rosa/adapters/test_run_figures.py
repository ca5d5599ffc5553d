"""The figures of a run, as its folder has them, and on the card of the adapter."""

import json

import pytest
import torch

from rosa.adapters.card import model_card
from rosa.adapters.run_figures import run_figures

STATE = {
    "global_step": 1200,
    "epoch": 1.5,
    "num_input_tokens_seen": 63406,
    "log_history": [
        {"step": 10, "loss": 0.875, "learning_rate": 1e-3},
        {"step": 10, "dls/layers": 15},
        {"step": 600, "eval_loss": 0.5},
        {"step": 610, "loss": float("nan"), "learning_rate": 2e-3},
        {"step": 1200, "loss": 0.25, "learning_rate": 1e-6},
        {"step": 1200, "eval_loss": 0.625},
        {"step": 1200, "train_loss": 0.4},
        "no entry",
    ],
}
FIGURES = {
    "steps": "1,200",
    "epochs": "1.5",
    "tokens seen": "63,406",
    "learning rate": "0.002",
    "training loss, first logged": "0.8750 (step 10)",
    "training loss, last logged": "0.2500 (step 1200)",
    "validation loss, lowest": "0.5000 (step 600)",
    "validation loss, last": "0.6250 (step 1200)",
}


def test_figures_are_those_of_the_trainers_log(tmp_path):
    assert run_figures(tmp_path) == {}
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    assert run_figures(tmp_path) == FIGURES


def test_the_learning_rate_is_the_one_that_was_set_where_a_checkpoint_says_it(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    for step, rate in ((900, 1.0), (1200, 3e-3)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "made_with.json").write_text(json.dumps({"learning_rate": rate}))
    assert run_figures(tmp_path)["learning rate"] == "0.003"


@pytest.mark.parametrize("state", ["{}", '{"log_history": 3, "global_step": "x", "epoch": true}'])
def test_a_state_that_says_nothing_gives_no_figures(state, tmp_path):
    (tmp_path / "trainer_state.json").write_text(state)
    assert run_figures(tmp_path) == {}


def test_a_damaged_state_is_told(tmp_path):
    (tmp_path / "trainer_state.json").write_text("[")
    with pytest.raises(ValueError, match="trainer_state.json is damaged: no valid JSON"):
        run_figures(tmp_path)


def test_the_card_shows_them_and_an_adapter_of_peft_has_one_too():
    description = {"peft_type": "LORA", "base_model_name_or_path": "user/base", "r": 8, "lora_bias": False}
    tensors = {"lora_A.weight": torch.zeros(8, 4)}
    card = model_card(description, tensors, source="me/out", figures=FIGURES)
    assert "# LORA adapter for user/base" in card and "32 parameters" in card and "| `r` | 8 |" in card
    assert "lora_bias" not in card and "norm weights" not in card
    assert 'rosa.load("me/out")' in card and "rosa chat --adapter me/out`" in card
    assert "## The run" in card and "| validation loss, lowest | 0.5000 (step 600) |" in card
    assert "## The run" not in model_card(description, tensors)
