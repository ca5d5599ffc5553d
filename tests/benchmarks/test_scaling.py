"""docs/scaling.md: its tables are what the formulas give, and the arithmetic is what a model computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

import rosa
from benchmarks import scaling
from benchmarks.document import fill


def test_the_document_has_the_tables_that_the_formulas_give():
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, scaling.tables()), "run `python -m benchmarks.scaling`"


@pytest.mark.parametrize("lowest", [0, 3])
def test_flops_are_those_that_are_counted(lowest):
    config = Qwen2Config(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = rosa.patch(AutoModelForCausalLM.from_config(config), rosa.RosaConfig(rank=8)).train()
    for layer in model.model.layers[:lowest]:
        layer.requires_grad_(False)
    rows = torch.randint(64, (2, 48))
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=rows, labels=rows).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = [rows.numel() * flops for flops in scaling.flops(model, 48, lowest=lowest)]
    assert forward.get_total_flops() == pytest.approx(expected[0], rel=0.03)
    assert backward.get_total_flops() == pytest.approx(expected[1], rel=0.03)


def test_a_ring_sends_a_share_of_the_payload_and_nothing_on_one_gpu():
    assert [scaling.all_gather(800.0, gpus) for gpus in (1, 2, 8)] == [0, 400, 700]
    assert [scaling.all_reduce(800.0, gpus) for gpus in (1, 2, 8)] == [0, 800, 1400]
    assert scaling.mean_trained(28, 0.5, 40) == (28 + 39 * 14) / 40
