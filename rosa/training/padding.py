"""How much of what a run computes is padding: the tokens that fill the rows of a batch up to its longest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.utils.data import BatchSampler
from transformers import Trainer


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """The share of tokens that is padding.

    Args:
        lengths (sequence of int): tokens of each row.
        batches (iterable of sequences of int): the indices of the rows that stand in a batch, for every batch; at least
            one.

    Returns:
        float: from 0 to below 1.
    """
    sizes = [[lengths[index] for index in batch] for batch in batches]
    return 1 - sum(map(sum, sizes)) / sum(len(batch) * max(batch) for batch in sizes)


def epoch_padding(trainer: Trainer) -> float:
    """The share of tokens that is padding in an epoch of a Trainer, where rows are padded to the longest of a batch.

    An order that is drawn at random is drawn once for this, and is not that of an epoch to come.

    Args:
        trainer (Trainer): its `train_dataset` is a datasets.Dataset with `input_ids`.
    """
    args, batches = trainer.args, trainer._get_train_sampler()
    if args.train_sampling_strategy != "batch_rebalance":  # whose sampler makes batches
        batches = BatchSampler(batches, args.train_batch_size, args.dataloader_drop_last)
    return padding_share([len(ids) for ids in trainer.train_dataset["input_ids"]], batches)
