"""How much of a data set's batches is padding, in random order, grouped by length, and without any.

    python -m benchmarks.padding TOKENIZER FILE...

TOKENIZER is a model's name or folder, FILE what `rosa train --data` takes; several are one data set. Rows are tokenized
as `rosa train` does it and batched as Trainer does it; one order is drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.utils.data import BatchSampler, RandomSampler
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

from rosa.training.data import load_rows, tokenize
from rosa.training.padding import padding_share

BATCHES = (2, 8, 32)  # the first is the paper's
MAX_LENGTH = 512


def shares(lengths: Sequence[int], batch: int, seed: int = 42) -> tuple[float, float]:
    """The share of tokens that is padding in batches of so many rows: in random order, and grouped by length."""

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    samplers = (
        RandomSampler(lengths, generator=drawn()),
        LengthGroupedSampler(batch, lengths=list(lengths), generator=drawn()),
    )
    random, grouped = (padding_share(lengths, BatchSampler(sampler, batch, drop_last=False)) for sampler in samplers)
    return random, grouped


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="The share of tokens that is padding.")
    parser.add_argument("tokenizer")
    parser.add_argument("files", nargs="+")
    args = parser.parse_args(argv)
    rows = [row for file in args.files for row in load_rows(file)]
    examples = tokenize(rows, AutoTokenizer.from_pretrained(args.tokenizer), max_length=MAX_LENGTH)
    lengths = [len(ids) for ids in examples["input_ids"]]
    print(f"{len(lengths):,} rows of {sum(lengths) / len(lengths):.0f} tokens, {min(lengths)} to {max(lengths)}")
    print("rows a batch | random order | grouped by length")
    for batch in BATCHES:
        print(f"{batch:12} | " + " | ".join(f"{share:.1%}" for share in shares(lengths, batch)))


if __name__ == "__main__":
    main()
