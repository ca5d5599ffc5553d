"""The module that `compose` adds behind a decoder layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rosa_kernels import road


class Turned(NamedTuple):
    """The tokens that one forward pass turns, and with which pairs."""

    masks: Tensor  # of every row of the batch, bool `[rows, pairs]`
    row: Tensor  # of every token, int64 `[tokens]`
    column: Tensor


class PairRotation(nn.Module):
    """RoAd_1 of the hidden states behind one decoder layer: an angle and a scale for each pair of neighbours."""

    def __init__(self, pairs: int, device: torch.device | str | None = None):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(pairs, dtype=torch.float32, device=device))
        self.alpha = nn.Parameter(torch.ones(pairs, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor, turned: Turned) -> Tensor:
        """R_m h = (m R + (1 - m) I) h of the tokens that are turned, m being their rows' masks; the others as given.

        Args:
            hidden (Tensor): `[rows, tokens, width]`.
            turned (Turned): the tokens and the masks.
        """
        masks, row, column = (t.to(hidden.device) for t in turned)
        theta, alpha = self.theta.masked_fill(~masks, 0.0), self.alpha.masked_fill(~masks, 1.0)
        z = road(hidden[row, column], theta, alpha, row.int(), variant=1)
        return hidden.index_put((row, column), z)
