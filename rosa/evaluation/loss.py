"""The loss of a model on rows of text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from rosa.data.tokens import IGNORED_LABEL, tokenize
from rosa.evaluation.generation import evaluating
from rosa.training.trainer import count_positions


def response_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], *, batch_size: int = 8
) -> float:
    """The mean loss of a response's token over all rows, given the prompt: in nats.

    Args:
        model (PreTrainedModel): a causal language model, with its adapter if it has one.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        rows (sequence of dict): rows of `rosa.data.rows.load_rows`.
        batch_size (int): rows read together; the result does not depend on it, but for rounding.

    Raises:
        ValueError: no rows, or a tokenizer without eos_token.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples, collate = tokenize(rows, tokenizer), DataCollatorForSeq2Seq(tokenizer)
    total, tokens = 0.0, 0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(examples), batch_size):
            some = examples.select(range(start, min(start + batch_size, len(examples))))
            batch = count_positions(collate, list(some))
            learnt = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
            total += learnt * model(**batch.to(model.device)).loss.item()
            tokens += learnt
    return total / tokens
