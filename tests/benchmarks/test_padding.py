"""The share of padding in batches of real lengths' spread."""

import torch

from benchmarks.padding import shares


def test_batches_grouped_by_length_have_less_padding_and_those_of_one_row_none():
    lengths = torch.randint(65, 245, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert shares(lengths, 1) == (0, 0)
    for batch in (2, 8):
        random, grouped = shares(lengths, batch)
        assert 0.1 < random < 0.5 and 0 < grouped < random / 5


def test_rows_of_one_length_have_no_padding():
    assert shares([7] * 10, 4) == (0, 0)
