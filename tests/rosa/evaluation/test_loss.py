"""The loss on rows of text: of a response's tokens, however the rows are put together."""

import pytest
import torch

import rosa
from rosa.adapters.roae import RoAE
from rosa.evaluation.loss import response_loss
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

ROWS = [{"instruction": "Say " + "it " * n, "input": "", "output": "so " * n} for n in (1, 2, 4, 6)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_depends_neither_on_the_batches_nor_on_the_padding(side):
    tokenizer = tiny_tokenizer(row["instruction"] + row["output"] for row in ROWS)
    model = tiny_model(len(tokenizer), initializer_range=0.3)
    rosa.patch(model, rosa.RosaConfig(r_low=1.0, alpha=1.0, rank=8))
    for module in model.modules():
        if isinstance(module, RoAE):  # one that sees where a token stands
            torch.nn.init.normal_(module.up)
    whole = response_loss(model, tokenizer, ROWS, batch_size=1)
    tokenizer.padding_side = side
    for batch_size in (2, 3, 4):
        assert response_loss(model, tokenizer, ROWS, batch_size=batch_size) == pytest.approx(whole, rel=1e-5)
