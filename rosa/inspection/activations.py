"""How strong rotated queries and keys are, by head dimension, layer and rotary frequency (the paper's Figure 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rosa.adapters.config import RosaConfig
from rosa.adapters.record import is_patched
from rosa.evaluation.generation import evaluating
from rosa.models.decoder import decoder_layers, rotary_functions
from rosa.models.probe import RotarySite, rotary_sites
from rosa.models.rotary import RotaryLayout, attach, read_call, serve_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R_LOWS = (0.1, 0.25, 0.5, 0.75, 1.0)
STATES = ("queries", "keys")
RECORDER_NAME = "activation_recorder"


@dataclass(frozen=True)
class LayerActivations:
    """The rotated queries and keys of one attention module, as sums over the tokens that it was measured on.

    They are what the model's rotary function returns, after RoAE where the model carries an adapter: whole heads, or
    their rotary part in families that hand over that part alone.

    Attributes:
        layer (int): index of the decoder layer, from 0.
        attention (str): the module's full name.
        layout (RotaryLayout): which elements of a head make a pair.
        tokens (int): tokens measured, padding left out.
        squares (dict): "queries" to the sums of squares over the tokens, float64 `[heads, width]`, and "keys" likewise;
            without "keys" where the module takes them from an earlier layer.
    """

    layer: int
    attention: str
    layout: RotaryLayout
    tokens: int
    squares: dict[str, Tensor]

    @property
    def by_pair(self) -> Tensor:
        """The rotary elements of a head in the order of their pairs, from the highest frequency to the lowest, the two
        of a pair beside each other: int64 `[rotary_dim]`."""
        elements = torch.arange(self.layout.rotary_dim)
        return elements if self.layout.interleaved else elements.view(2, -1).T.flatten()

    def norms(self, states: str) -> Tensor:
        """The L2 norm over the tokens of each element of a head, divided by the root of the number of tokens, so that
        long texts and short ones compare; mean of the heads: float64 `[width]`, in the model's own layout."""
        return (self.squares[states] / self.tokens).sqrt().mean(0)

    def pair_energy(self, states: str) -> Tensor:
        """The sum of squares of each rotary pair, over tokens and heads: float64 `[rotary_dim / 2]`, the lowest
        frequency last."""
        return self.squares[states].sum(0)[self.by_pair].view(-1, 2).sum(1)


class EnergyShare(NamedTuple):
    """Which share of the rotary pairs' energy (their sum of squares) lies in the last `r_low` of the pairs, those of
    the lowest frequency, which RoAE enhances.

    `layer` is None for all layers together, `uniform` the share that evenly spread energy would give, and `keys` None
    where no layer rotates keys.
    """

    layer: int | None
    r_low: float
    uniform: float
    queries: float
    keys: float | None
    both: float


def token_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int = 2048, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Tokenise texts for `measure`.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer.
        texts (sequence of str): see `id_batches` for what becomes of a long one.
        max_length, batch_size (int): as for `id_batches`.

    Returns:
        list of dict: as `id_batches` has it.

    Raises:
        TypeError: `texts` is one string.
        ValueError: a number below 1, or no text holds a token.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string")
    rows = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return id_batches(rows, max_length=max_length, batch_size=batch_size)


def id_batches(
    rows: Sequence[Sequence[int]], *, max_length: int = 2048, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Put token ids together for `measure`.

    Args:
        rows (sequence of token ids): a longer one than `max_length` is read in pieces.
        max_length (int): most tokens of a piece.
        batch_size (int): pieces in a batch, padded on the right; what is measured does not depend on it.

    Returns:
        list of dict: `input_ids` and `attention_mask`, int64 `[pieces, tokens]`; the longest first.

    Raises:
        ValueError: a number below 1, or no row holds a token.
    """
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    pieces = [row[start : start + max_length] for row in rows for start in range(0, len(row), max_length)]
    if not pieces:
        raise ValueError("there is no text to measure: not one token")
    pieces.sort(key=len, reverse=True)  # pieces of like length share a batch: less padding
    return [_padded(pieces[start : start + batch_size]) for start in range(0, len(pieces), batch_size)]


def measure(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[LayerActivations]:
    """Measure the rotated queries and keys of every attention module that rotates.

    The model runs in evaluation mode, without gradients and without its head, and is then as it was; nothing is kept of
    a batch but sums, in float64 (in float32 on devices without it). An attention module that did not run is left out.

    Args:
        model (nn.Module): a model that `rosa.patch` could take, with an adapter or without.
        batches (iterable of mapping): arguments of its forward, such as those of `token_batches`. Padding, on either
            side, is what `attention_mask` has zeros for.

    Returns:
        list of LayerActivations: in the order of the layers.

    Raises:
        UnsupportedModelError: the model has no rotary attention that RoSA can follow.
        ValueError: no batch, no token but padding, or padding where attention does not see one state a token.
    """
    device = next(model.parameters()).device
    decoder = getattr(model, "base_model", model)
    with _recorders(model) as recorders, evaluating(model), torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            kept = None if mask is None or mask.all() else mask.bool()
            for recorder in recorders:
                recorder.kept = kept
            decoder(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    measured = [recorder for recorder in recorders if recorder.tokens]
    if not measured:
        raise ValueError("there is nothing to measure: no batch with a token that is not padding")
    indices = {layer.name: index for index, layer in enumerate(decoder_layers(model))}
    return [
        LayerActivations(
            indices[recorder.site.layer.name],
            recorder.site.name,
            recorder.site.shape.layout,
            recorder.tokens,
            {states: squares.double().cpu() for states, squares in recorder.squares.items()},
        )
        for recorder in measured
    ]


def energy_shares(layers: Sequence[LayerActivations], r_lows: Iterable[float] = R_LOWS) -> list[EnergyShare]:
    """The share of energy in the last r_low of the pairs, for a choice of r_low.

    Args:
        layers (sequence of LayerActivations): what `measure` returns.
        r_lows (iterable of float): shares of the pairs, in (0, 1]; the number of pairs is rounded down, as RoAE does.

    Returns:
        list of EnergyShare: for each r_low in ascending order all layers together, then each layer.

    Raises:
        ValueError: an r_low is out of its range, or leaves no pair of a layer.
    """
    shares = []
    for r_low in sorted(set(r_lows)):
        config = RosaConfig(r_low=r_low)
        shares += [_share(None, layers, config), *(_share(one.layer, [one], config) for one in layers)]
    return shares


def usable_r_lows(layers: Sequence[LayerActivations], r_lows: Iterable[float] = R_LOWS) -> list[float]:
    """Those of the r_lows that leave at least one pair of every layer."""
    fewest = min(one.layout.rotary_dim for one in layers)
    return [r_low for r_low in r_lows if r_low * fewest >= 2 - 1e-9]


def _share(layer: int | None, layers: Sequence[LayerActivations], config: RosaConfig) -> EnergyShare:
    counts = [(config.low_pairs(one.layout.rotary_dim), one.layout.rotary_dim // 2) for one in layers]
    low, total = ({states: 0.0 for states in STATES} for _ in range(2))
    for one, (pairs, _) in zip(layers, counts, strict=True):
        for states in one.squares:
            energy = one.pair_energy(states)
            low[states] += energy[-pairs:].sum().item()
            total[states] += energy.sum().item()
    return EnergyShare(
        layer,
        config.r_low,
        sum(pairs for pairs, _ in counts) / sum(of for _, of in counts),
        low["queries"] / total["queries"],
        low["keys"] / total["keys"] if any("keys" in one.squares for one in layers) else None,
        sum(low.values()) / sum(total.values()),
    )


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = [row + row[-1:] * (width - len(row)) for row in rows]  # a token of the text: one that the model surely knows
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


class _Recorder(nn.Module):
    """Attached to an attention module as a rotary adapter would be, it is told what the rotary function returns."""

    def __init__(self, site: RotarySite):
        super().__init__()
        self.site = site
        self.tokens = 0
        self.squares: dict[str, Tensor] = {}
        self.kept: Tensor | None = None  # of the batch that runs, the tokens that are not padding; None keeps all
        self._next = "queries"  # of families that rotate one at a time

    def record(self, rotated: tuple[Tensor, ...]) -> None:
        for x in rotated:
            states, layout = self._next, self.site.shape.layout
            if states == "queries" and self.site.shape.key_heads:
                self._next = "keys"
            else:
                self._next = "queries"
            x = self._of_text(layout.heads_first(x).transpose(1, 2))
            self.tokens += x.shape[0] if states == "queries" else 0
            exact = torch.float32 if x.device.type == "mps" else torch.float64
            squares = torch.linalg.vector_norm(x, dim=0, dtype=exact).square()
            self.squares[states] = self.squares.get(states, 0) + squares

    def _of_text(self, x: Tensor) -> Tensor:
        """`[batch, seq, heads, width]` without the padding, `[tokens, heads, width]`."""
        if self.kept is None:
            return x.flatten(0, 1)
        if self.kept.shape != x.shape[:2]:
            raise ValueError(
                f"{self.site.name} attends to {list(x.shape[:2])} states where the batch has {list(self.kept.shape)} "
                "tokens, so its padding cannot be told apart: measure it one text at a time (batch_size=1)"
            )
        return x[self.kept.to(x.device)]


@contextmanager
def _recorders(model: nn.Module) -> Iterator[list[_Recorder]]:
    """A recorder on every attention module that rotates, for the time of the block."""
    recorders = [_Recorder(site) for site in rotary_sites(model)]
    with ExitStack() as stack:
        for attention_class in dict.fromkeys(type(recorder.site.attention) for recorder in recorders):
            if is_patched(model):  # also where another library replaced the function since
                serve_adapters(attention_class)
            stack.enter_context(_recording(attention_class))
        for recorder in recorders:
            attention = recorder.site.attention
            hooks = attach(attention, RECORDER_NAME, recorder)
            stack.callback(delattr, attention, RECORDER_NAME)
            for hook in hooks:
                stack.callback(hook.remove)
        yield recorders


@contextmanager
def _recording(attention_class: type[nn.Module]) -> Iterator[None]:
    """Lets the rotary functions that the class's forward calls tell recorders, for the time of the block."""
    namespace, names = rotary_functions(attention_class)
    originals = {name: namespace[name] for name in names}
    namespace.update({name: _telling(function) for name, function in originals.items()})
    try:
        yield
    finally:
        namespace.update(originals)


def _telling(original: Callable) -> Callable:
    """A family's rotary function, serving adapters or not, that tells a recorder what it returns."""

    @functools.wraps(original)
    def rotate(*args, **kwargs):
        call = read_call(original, args, kwargs)
        recorder = None if call is None else call.adapted.adapter()
        if not isinstance(recorder, _Recorder):
            return original(*args, **kwargs)
        # What the recorder's hook found in the place of cos: cos, or what an adapter's hook had put there.
        sin = () if call.sin is None else (call.sin,)
        rotated = original(*call.states, call.adapted.cos, *sin, **call.options)
        recorder.record(rotated if len(call.states) == 2 else (rotated,))
        return rotated

    rotate.serves_rotary_adapters = rotate
    return rotate
