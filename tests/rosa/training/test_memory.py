"""What a training step needs of a GPU's memory: what is counted without values is what a real pass saves."""

import pytest
import torch
from torch import nn

import rosa
from rosa.training.memory import CONTEXT, kept_by_layers, logits, saved_bytes, state_bytes, step_memory
from tests.rosa.conftest import make_model

ROWS, LENGTH = 2, 8


def without_values(family="qwen2"):
    with torch.device("meta"):
        return rosa.patch(make_model(family, dtype=torch.bfloat16), rosa.RosaConfig(rank=4))


def test_a_storage_counts_once_and_a_parameter_never():
    module = nn.Linear(8, 8)
    x = torch.randn(3, 8, requires_grad=True)
    out, saved = saved_bytes(module, lambda: module(x).tanh() * x)
    assert out.shape == (3, 8)
    assert saved == 2 * 3 * 8 * 4  # x, saved by two operations, and the result of tanh, likewise


def test_what_the_layers_keep_is_what_a_padded_batch_with_values_saves(monkeypatch):
    found = step_memory(without_values(), ROWS, LENGTH, 0, checkpoints=False, bf16=True)
    monkeypatch.setenv("ROSA_BACKEND", "triton")
    model = rosa.patch(make_model("qwen2", dtype=torch.bfloat16), rosa.RosaConfig(rank=4)).train()
    with torch.autocast("cpu", torch.bfloat16):
        ids = mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
        mask = mask.index_fill(1, torch.tensor([0]), 0)
        _, saved = saved_bytes(model, lambda: model.model(input_ids=ids, attention_mask=mask, use_cache=False))
    assert found.layers == saved


def test_weights_that_train_count_four_times_and_logits_where_there_are_labels():
    model = without_values("gemma2")
    trained = sum(p.nbytes for p in rosa.trainable_parameters(model))
    base = sum(p.nbytes for p in model.parameters()) - trained
    found = step_memory(model, ROWS, LENGTH, 5, checkpoints=False, bf16=True)
    assert (found.base, found.trained, found.context) == (base, 4 * trained, CONTEXT)
    assert state_bytes(base, trained) == base + 4 * trained
    assert found.logits == 5 * 96 * (14 + 2)  # Gemma-2 caps its logits
    assert logits(make_model("qwen2").config) == 96 * 14


def test_gradient_checkpointing_keeps_the_inputs_of_the_layers_and_one_layer():
    whole, less = (step_memory(without_values(), 8, 64, 0, checkpoints=c, bf16=True) for c in (False, True))
    assert less.layers == pytest.approx(4 * 8 * 64 * 32 * 2 + whole.layers / 4) and less.layers < whole.layers
    assert kept_by_layers(make_model("qwen2").config, 10.0, 8, checkpoints=False) == 40.0
