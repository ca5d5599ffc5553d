"""Where the prompt ends in what a model is given: the tokens that a composed adapter turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rosa.composition.division import ALL


def prompt_tokens(given: Mapping[str, Any], positions: int | str, lengths: Tensor | None, *, training: bool) -> Tensor:
    """Which tokens of one forward pass are among the last ones of their row's prompt.

    The prompt ends where `lengths` says; without these before the first label; without labels it is all that the model
    is given with an empty cache, and nothing of what comes after, as in `generate`. Padding is on either side.

    Args:
        given (mapping): the arguments of the model's forward, by name.
        positions (int or "all"): how many tokens at the end of each prompt, fewer where it is shorter; or all tokens,
            those of the answer too.
        lengths (Tensor, optional): tokens of each row's prompt without padding, int64 `[rows]`.
        training (bool): the model's mode.

    Returns:
        Tensor: bool, `[rows, tokens]`.

    Raises:
        ValueError: the end of a prompt is not known, or lies outside of its row.
    """
    tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    rows, width = tokens.shape[:2]
    cache, labels, mask = (given.get(name) for name in ("past_key_values", "labels", "attention_mask"))
    past = int(cache.get_seq_length()) if cache is not None else 0
    known = isinstance(mask, Tensor) and mask.shape == (rows, past + width)  # generate hands a static cache another
    real = mask.bool() if known else torch.ones(rows, past + width, dtype=torch.bool, device=tokens.device)
    if positions == ALL:
        return real[:, past:]
    if lengths is not None:
        end = _end_by_length(lengths, real, whole=cache is None)
    elif labels is not None:
        end = past + _first_label(labels, real[:, past:])
    elif cache is None and (training or given.get("use_cache") is False):
        raise ValueError(
            "nothing says where the prompts end: hand the model labels, or give prompt_lengths with the tasks (without "
            "them, a model that trains or that generates without a cache could be in the midst of an answer)"
        )
    else:
        end = _end(real) if past == 0 else torch.full((rows,), past, device=tokens.device)
    column = torch.arange(past, past + width, device=tokens.device)
    return real[:, past:] & (column < end[:, None]) & (column >= end[:, None] - positions)


def _end(real: Tensor) -> Tensor:
    """The column behind the last token of every row that is no padding."""
    return real.shape[1] - real.flip(1).int().argmax(1)


def _end_by_length(lengths: Tensor, real: Tensor, *, whole: bool) -> Tensor:
    tokens = real.sum(1)
    if whole and bool((lengths > tokens).any()):  # with a cache the rest may come later
        row = int((lengths > tokens).nonzero()[0])
        raise ValueError(f"prompt_lengths gives row {row} {lengths[row]} tokens, but it has {tokens[row]}")
    return real.int().argmax(1) + lengths


def _first_label(labels: Tensor, real: Tensor) -> Tensor:
    """The column of every row's first label; behind the last token of a row that has none."""
    labelled = labels != -100
    first = torch.where(labelled.any(1), labelled.int().argmax(1), _end(real))
    if bool((first == 0).any()):
        row = int((first == 0).nonzero()[0])
        raise ValueError(
            f"row {row} has a label on its first token, and so no prompt before its answer: set the prompt's labels to "
            "-100, or give prompt_lengths with the tasks"
        )
    return first
