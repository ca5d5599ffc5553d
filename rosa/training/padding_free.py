"""Batches without padding: the rows of a batch one behind another in a single row, each with positions of its own.

Attention must keep them apart. FlashAttention is told where each begins; for the other back ends transformers makes a
mask of the positions, for most models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel, TrainerCallback
from transformers.utils.generic import is_flash_attention_requested

# Two texts of any tokens, and how much of `leak` may be rounding. Dense attention is at 0, in 16 bits too; the tiny
# model that leaked least, which has state-space layers beside attention, at 0.06.
_TEXTS = ([1, 2, 3, 4], [5, 6, 7, 8])
_TOLERANCE = 0.02


def flattening(model: PreTrainedModel) -> DataCollatorWithFlattening:
    """The collator that puts the rows of a batch one behind another, as the model's attention wants it.

    Args:
        model (PreTrainedModel): or peft's wrapper of one.

    Returns:
        DataCollatorWithFlattening: makes `input_ids`, `labels` and `position_ids` `[1, tokens]`.
    """
    # Without the lengths, FlashAttention would look for them in the positions in every layer, and wait for the GPU.
    return DataCollatorWithFlattening(return_flash_attn_kwargs=is_flash_attention_requested(model.config))


class RowsApart(TrainerCallback):
    """Looks, before the first step and with the very model that trains, whether rows in one row are kept apart.

    Args:
        collate (callable): what the batches are made with.

    Raises:
        ValueError: when training begins; a row sees another one, or one process would share out the batches over
            several GPUs.
    """

    def __init__(self, collate: Callable[[list], dict[str, Any]]):
        self.collate = collate

    def on_train_begin(self, args, state, control, model, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"--padding_free makes one row of a batch, which one process cannot share out over {args.n_gpu} GPUs: "
                "start a process for each (torchrun), or let it see one (CUDA_VISIBLE_DEVICES=0)"
            )
        if leak(model, self.collate) > _TOLERANCE:
            raise ValueError(
                f"--padding_free is not for {model.config.model_type} with {model.config._attn_implementation} "
                "attention: in a row of several texts a text would see the one before it. Leave it out, or choose "
                "another --attn_implementation"
            )


@torch.no_grad()
def leak(model: PreTrainedModel, collate: Callable[[list], dict[str, Any]]) -> float:
    """How far a text that stands behind another in a row is from the same text alone.

    Args:
        model (PreTrainedModel): or peft's wrapper of one, on the device where it computes.
        collate (callable): from rows with `input_ids` to a batch of one row.

    Returns:
        float: 0 if it is computed as if it were alone, 1 if as if it went on from the other.
    """

    def outputs(*texts: list[int]) -> Tensor:
        inputs = collate([{"input_ids": text} for text in texts])
        del inputs["labels"]
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        return model(**inputs).logits[0].float()

    device, (before, text) = model.device, _TEXTS
    was_training = model.training
    model.eval()
    alone = outputs(text, before)[: len(text)]  # in a row as long, as rounding depends on that
    behind, going_on = (outputs(*rows)[len(before) :] for rows in ((before, text), (before + text,)))
    model.train(was_training)
    return ((behind - alone).norm() / (going_on - alone).norm()).item()
