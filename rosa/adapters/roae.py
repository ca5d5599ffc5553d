"""RoAE (RoPE-aware Attention Enhancement): the module that is added to an attention layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.adapters.config import RosaConfig
from rosa.models.rotary import RotaryLayout, attach
from rosa_kernels import roae, rope_roae, signals


class RoAE(nn.Module):
    """A rotary adapter: rotates queries and keys and enhances their low-frequency pairs by a signal of the input.

    Parameters, in the orientation of `nn.Linear` (outputs by inputs):
        down `[rank, hidden_size]` and up `[heads * d_low, rank]`: W_down and W_up of Eq. 2. up starts at zero.
        gqa_down `[rank, heads * d_low]` and gqa_up `[key_heads * d_low, rank]`: W_GQA of Eq. 3, low-rank; None where
            key_heads equals heads, or there are no keys to rotate.

    Args:
        config (RosaConfig): r_low, alpha, rank and the parameters' dtype.
        hidden_size (int): d, size of the attention module's input.
        heads, key_heads (int): query and key heads; no key heads where the module rotates queries alone.
        layout (RotaryLayout): how the model rotates.
        device (torch.device): where the parameters are made.
        empty (bool): leave them without values, for those of an adapter that is loaded.

    Raises:
        ValueError: r_low leaves no pair.
    """

    CHILD = "roae"  # under this name an attention module has it

    def __init__(
        self,
        config: RosaConfig,
        hidden_size: int,
        heads: int,
        key_heads: int,
        layout: RotaryLayout,
        device: torch.device | str | None = None,
        *,
        empty: bool = False,
    ):
        super().__init__()
        self.alpha, self.layout, self.heads = config.alpha, layout, heads
        shapes = self.shapes(config, hidden_size, heads, key_heads, layout)

        def weight(name: str) -> nn.Parameter | None:
            if name not in shapes:
                return None
            return nn.Parameter(torch.empty(shapes[name], dtype=config.torch_dtype, device=device))

        self.down, self.up = weight("down"), weight("up")
        self.gqa_down, self.gqa_up = weight("gqa_down"), weight("gqa_up")
        if not empty:
            self.reset_parameters()

    @staticmethod
    def shapes(
        config: RosaConfig, hidden_size: int, heads: int, key_heads: int, layout: RotaryLayout
    ) -> dict[str, tuple[int, int]]:
        """The shapes of the parameters, by name; the arguments are the module's own.

        Raises:
            ValueError: r_low leaves no pair.
        """
        d_low = 2 * config.low_pairs(layout.rotary_dim)
        shapes = {"down": (config.rank, hidden_size), "up": (heads * d_low, config.rank)}
        if key_heads not in (0, heads):
            shapes |= {"gqa_down": (config.rank, heads * d_low), "gqa_up": (key_heads * d_low, config.rank)}
        return shapes

    def reset_parameters(self) -> None:
        """up to zero, the others as LoRA's A (Kaiming uniform): the model computes what it computed before."""
        nn.init.zeros_(self.up)
        for weight in (self.down, self.gqa_down, self.gqa_up):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Enhanced queries and keys.

        Args:
            q, k (Tensor): queries `[batch, heads, seq, head_dim]` and keys `[batch, key_heads, seq, head_dim]`, before
                rotation; sequence before heads where the layout says so.
            cos, sin (Tensor): as the model gives them to its rotary function; sin is None where cos is cos + i sin.
            hidden_states (Tensor): H, the attention module's input, `[batch, seq, hidden_size]`.

        Returns:
            q and k after rotation, enhanced; shapes, dtypes and layouts as given.
        """
        turn = self.layout.heads_first
        q, k = roae(
            self._arranged(q), self._arranged(k), *self.layout.pairwise(cos, sin),
            hidden_states, self.down, self.up, self.gqa_down, self.gqa_up, **self._options,
        )  # fmt: skip
        return turn(q), turn(k)

    def rotate_one(self, x: Tensor, cos: Tensor, sin: Tensor, hidden_states: Tensor) -> Tensor:
        """As `forward` for queries or keys alone, in families that rotate them one at a time; they are told apart by
        their number of heads, and where that is the same, they are enhanced alike."""
        U, S_K = self._signals(hidden_states.to(x.dtype))
        x = self._arranged(x)
        nothing = x[:, :0]
        rotary = self.layout.pairwise(cos, sin)
        if x.shape[1] == self.heads:
            x, _ = rope_roae(x, nothing, *rotary, U, U[..., :0], **self._options)
        else:
            _, x = rope_roae(nothing, x, *rotary, U[..., :0], S_K, **self._options)
        return self.layout.heads_first(x)

    def attach(self, attention: nn.Module) -> list[RemovableHandle]:
        """Has the attention module's rotary function served by its child CHILD, whichever that is; removing the hooks
        silences it."""
        return attach(attention, self.CHILD, self)

    def _signals(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        return signals(hidden_states, self.down, self.up, self.gqa_down, self.gqa_up)

    def _arranged(self, x: Tensor) -> Tensor:
        return self.layout.arrange(self.layout.heads_first(x))

    @property
    def _options(self) -> dict[str, Any]:
        return dict(alpha=self.alpha, interleaved=self.layout.interleaved, rotary_dim=self.layout.rotary_dim)

    def extra_repr(self) -> str:
        """The numbers that define the module, for `print(model)`."""
        return f"rank={self.down.shape[0]}, alpha={self.alpha}, layout={self.layout}"
