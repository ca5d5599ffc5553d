"""The configurations of adapters: what all have, RoSA's and RoAd's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")
FLOAT32 = torch.finfo(torch.float32)

VARIANTS = (1, 2, 4)
ALL_LINEAR = "all-linear"
PAIRINGS = ("neighbours", "half", "rope")


class AdapterConfig:
    """What the configurations of all adapters have: `layers`, `train_norms` and `adapter_dtype`."""

    layers: tuple[int, ...] | None
    train_norms: bool
    adapter_dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `adapter_dtype` names."""
        return getattr(torch, self.adapter_dtype)

    def _check_common(self) -> None:
        if not isinstance(self.train_norms, bool):
            raise TypeError(f"train_norms must be a bool, got {self.train_norms!r}")
        if self.adapter_dtype not in ADAPTER_DTYPES:
            raise ValueError(f"adapter_dtype must be one of {', '.join(ADAPTER_DTYPES)}, got {self.adapter_dtype!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", _layer_indices(self.layers))


@dataclass(frozen=True)
class RosaConfig(AdapterConfig):
    """RoSA, as `rosa.patch` adds it to a model. The defaults are the paper's.

    Args:
        r_low (float): share of the rotary pairs, counted from the lowest frequency, that is enhanced; in (0, 1].
        alpha (float): strength of the enhancement, Eq. 4; within the range of float32, in which kernels compute.
        rank (int): inner size of the low-rank projections W_down W_up (Eq. 2) and W_GQA (Eq. 3); at least 1.
        train_norms (bool): train the weights of the norms that stand in the adapted decoder layers themselves.
        layers (tuple of int or None): indices of the decoder layers to adapt, from 0; None adapts all.
        adapter_dtype (str): dtype of the adapter's parameters: "float32", "bfloat16", "float16" or "float64". Norms
            that train are widened to it.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of its range.
    """

    r_low: float = 0.25
    alpha: float = 0.1
    rank: int = 128
    train_norms: bool = True
    layers: tuple[int, ...] | None = None
    adapter_dtype: str = "float32"

    def __post_init__(self):
        _require_number("r_low", self.r_low)
        _require_number("alpha", self.alpha)
        if not 0 < self.r_low <= 1:
            raise ValueError(f"r_low must lie in (0, 1], got {self.r_low}")
        if not (self.alpha == 0 or FLOAT32.tiny <= abs(self.alpha) <= FLOAT32.max):
            raise ValueError(
                f"alpha must be finite, and 0 or {FLOAT32.tiny:.4g} to {FLOAT32.max:.4g} in size, as float32 is, "
                f"got {self.alpha}"
            )
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"rank must be an int, got {self.rank!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        self._check_common()

    def low_pairs(self, rotary_dim: int) -> int:
        """n, the number of low-frequency pairs that are enhanced: floor(rotary_dim * r_low / 2).

        Raises:
            ValueError: r_low leaves no pair of a head with `rotary_dim` rotary elements.
        """
        # The margin keeps products such as 0.29 * 200, one rounding below a whole number, on that number.
        pairs = math.floor(rotary_dim * self.r_low / 2 + 1e-9)
        if pairs < 1:
            raise ValueError(
                f"r_low={self.r_low} leaves no pair of {rotary_dim} rotary elements a head; "
                f"the smallest that does is {2 / rotary_dim:g}"
            )
        return pairs


@dataclass(frozen=True)
class RoadConfig(AdapterConfig):
    """RoAd (2D rotary adaptation, arXiv 2409.00119), as `rosa.patch` adds it to a model: the outputs of linear layers
    turned and scaled in pairs.

    Args:
        variant (int): how many angles and scales a pair of outputs has. 1: one of each; 2: one of each a row; 4: two of
            each a row. Variant 2 reaches every 2 x 2 matrix already: 4 has more numbers, and no more functions.
        targets (str or tuple of str): "all-linear", every linear layer of the decoder layers whose output width is
            even, as the paper has it; or the ends of their names, such as ("q_proj", "v_proj"), in any order.
            Embeddings and the output layer are none of them, nor layers whose weight the model's code takes by itself,
            as Mamba's fused kernels do.
        pairing (str or int): which outputs are a pair. "neighbours", 2i and 2i + 1, the paper's, which fits every even
            width and is the default for that; "half", i and i + head size / 2 within groups of the head size; "rope",
            for the layers that make queries and keys, the pairs that the model's own RoPE rotates (variant 1 is then a
            scale and a phase of each), and neighbours for all others; or peft's group size, an even number: i and
            i + size / 2 within groups of it.
        layers (tuple of int or None): indices of the decoder layers to adapt, from 0; None adapts all.
        adapter_dtype (str): dtype of the angles and scales: "float32", "bfloat16", "float16" or "float64". In bfloat16
            a scale of 1 + 1e-3 rounds to 1.
        train_norms (bool): train the weights of the norms that stand in the adapted decoder layers themselves, too.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of its range.
    """

    variant: int = 2
    targets: str | tuple[str, ...] = ALL_LINEAR
    pairing: str | int = "neighbours"
    layers: tuple[int, ...] | None = None
    adapter_dtype: str = "float32"
    train_norms: bool = False

    def __post_init__(self):
        if type(self.variant) is not int or self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(map(str, VARIANTS))}, got {self.variant!r}")
        if self.targets != ALL_LINEAR:
            object.__setattr__(self, "targets", _names(self.targets))
        if self.pairing not in PAIRINGS and not _is_group(self.pairing):
            raise ValueError(
                f"pairing must be {', '.join(map(repr, PAIRINGS))} or an even group size from 2, got {self.pairing!r}"
            )
        self._check_common()


def _names(targets: Any) -> tuple[str, ...]:
    if isinstance(targets, str):
        raise ValueError(f'targets must be "{ALL_LINEAR}" or a sequence of names such as ("q_proj",), got {targets!r}')
    try:
        names = tuple(targets)
    except TypeError:
        raise TypeError(f'targets must be "{ALL_LINEAR}" or a sequence of names, got {targets!r}') from None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets must hold names of linear layers, got {targets!r}")
    return tuple(sorted(set(names)))


def _is_group(pairing: object) -> bool:
    return isinstance(pairing, int) and not isinstance(pairing, bool) and pairing >= 2 and pairing % 2 == 0


def _require_number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} must be a number, got {value!r}")


def _layer_indices(layers: Any) -> tuple[int, ...]:
    try:
        indices = tuple(layers)
    except TypeError:
        raise TypeError(f"layers must be a sequence of layer indices or None, got {layers!r}") from None
    if not indices:
        raise ValueError("layers is empty: name at least one layer, or None for all")
    if any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise TypeError(f"layers must hold ints, got {layers!r}")
    if min(indices) < 0 or len(set(indices)) != len(indices):
        raise ValueError(f"layers must be distinct indices from 0, got {layers!r}")
    return tuple(sorted(indices))
