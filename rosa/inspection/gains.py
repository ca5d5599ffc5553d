"""What a RoSA adapter does to the rotary pairs: the gains 1 + alpha S of Eq. 4, by layer, head and pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn import functional as F

from rosa.adapters.roae import RoAE
from rosa.evaluation.generation import evaluating
from rosa.inspection.activations import STATES
from rosa.inspection.figures import COLOURS, REFERENCE, TITLE, save
from rosa.models.decoder import decoder_layers
from rosa_kernels import signals

PARTS = ("real", "imaginary")


@dataclass(frozen=True)
class LayerGains:
    """The gains of one attention module's RoAE over the tokens that it was measured on.

    Attributes:
        layer (int): index of the decoder layer, from 0.
        tokens (int): tokens measured, padding left out.
        mean, deviation, least, greatest (dict): of the gains over the tokens; "queries" to float64
            `[heads, 2, pairs]`, the real parts of the enhanced pairs before the imaginary ones, the lowest frequency
            last, and "keys" likewise where the module rotates keys.
    """

    layer: int
    tokens: int
    mean: dict[str, Tensor]
    deviation: dict[str, Tensor]
    least: dict[str, Tensor]
    greatest: dict[str, Tensor]


def measure_gains(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[LayerGains]:
    """Measure the gains of every RoAE that is switched in.

    The model runs in evaluation mode, without gradients and without its head, and is then as it was.

    Args:
        model (nn.Module): a model with an adapter of RoSA.
        batches (iterable of mapping): arguments of its forward, such as those of `activations.token_batches`. Padding
            is what `attention_mask` has zeros for.

    Returns:
        list of LayerGains: in the order of the layers.

    Raises:
        ValueError: the model carries no RoAE, or there is no token.
    """
    device = next(model.parameters()).device
    decoder = getattr(model, "base_model", model)
    with _meters(model) as meters, evaluating(model), torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            for meter in meters:
                meter.kept = None if mask is None else mask.bool().to(device)
            decoder(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
    if not any(meter.tokens for meter in meters):
        raise ValueError("there is nothing to measure: no batch with a token that is not padding")
    return [meter.read() for meter in meters]


class _Meter:
    """A forward pre-hook of an attention module, which adds up the gains that its RoAE gives."""

    def __init__(self, layer: int, module: RoAE):
        self.layer, self.module = layer, module
        self.kept: Tensor | None = None
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.least: dict[str, Tensor] = {}
        self.greatest: dict[str, Tensor] = {}

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rows = hidden_states.flatten(0, 1) if self.kept is None else hidden_states[self.kept]
        self.tokens += rows.shape[0]
        for states, S in self._signals(rows[None].float()).items():
            heads = S.shape[-1] // self.d_low
            gains = 1 + self.module.alpha * S[0].double().unflatten(-1, (heads, 2, -1))
            self.sums[states] = self.sums.get(states, 0) + gains.sum(0)
            self.squares[states] = self.squares.get(states, 0) + gains.square().sum(0)
            self.least[states] = torch.minimum(self.least.get(states, gains[0]), gains.amin(0))
            self.greatest[states] = torch.maximum(self.greatest.get(states, gains[0]), gains.amax(0))

    @property
    def d_low(self) -> int:
        """Enhanced elements of a head."""
        return self.module.up.shape[0] // self.module.heads

    def _signals(self, hidden_states: Tensor) -> dict[str, Tensor]:
        module = self.module
        U, S_K = signals(hidden_states, module.down, module.up, module.gqa_down, module.gqa_up)
        S = F.silu(U)  # Eq. 2
        return {"queries": S, "keys": S if S_K is None else S_K}

    def read(self) -> LayerGains:
        """What was measured."""
        mean = {states: total / self.tokens for states, total in self.sums.items()}
        variance = {states: self.squares[states] / self.tokens - mean[states].square() for states in mean}
        deviation = {states: value.clamp(min=0).sqrt() for states, value in variance.items()}
        found = (mean, deviation, self.least, self.greatest)
        return LayerGains(self.layer, self.tokens, *({s: x.cpu() for s, x in part.items()} for part in found))


@contextmanager
def _meters(model: nn.Module) -> Iterator[list[_Meter]]:
    """A meter on every attention module with a RoAE, for the time of the block."""
    found = [
        (attention, _Meter(index, module))
        for index, layer in enumerate(decoder_layers(model))
        for attention in model.get_submodule(layer.name).modules()
        if isinstance(module := getattr(attention, RoAE.CHILD, None), RoAE)
    ]
    if not found:
        raise ValueError("this model carries no adapter of RoSA that is switched in: rosa.load_adapter puts one in")
    hooks = [attention.register_forward_pre_hook(meter, with_kwargs=True) for attention, meter in found]
    try:
        yield [meter for _, meter in found]
    finally:
        for hook in hooks:
            hook.remove()


def gains_table(layers: Sequence[LayerGains]) -> str:
    """A row for queries and one for keys: the mean distance of the gains from 1, their extremes, and how far the gains
    of the two parts of a pair are apart, over all layers; and the layers that are changed least and most."""
    lines = [
        "gains 1 + alpha S of the enhanced pairs; 1 changes nothing",
        f"{'':8}{'|mean - 1|':>11}{'over tokens':>12}{'least':>8}{'most':>8}{'parts apart':>12}"
        "   |mean - 1|, least and greatest layer",
    ]
    for states in STATES:
        having = [one for one in layers if states in one.mean]
        if not having:
            continue
        distances = {one.layer: (one.mean[states] - 1).abs().mean().item() for one in having}
        apart = [(one.mean[states][:, 0] - one.mean[states][:, 1]).abs().mean().item() for one in having]
        spread = [one.deviation[states].mean().item() for one in having]
        numbers = (
            f"{sum(distances.values()) / len(having):11.4f}{sum(spread) / len(having):12.4f}"
            f"{min(one.least[states].min().item() for one in having):8.3f}"
            f"{max(one.greatest[states].max().item() for one in having):8.3f}{sum(apart) / len(having):12.4f}"
        )
        ends = [pick(distances, key=distances.get) for pick in (min, max)]
        lines.append(f"{states:8}{numbers}" + "".join(f"{distances[end]:9.4f} (layer {end})" for end in ends))
    return "\n".join(lines)


def draw_gains(layers: Sequence[LayerGains], path: Path) -> None:
    """The gains by layer, by pair and by head, queries above keys. The line is the mean over tokens, heads and parts,
    the dark band reaches over the means of heads and parts, the light one from the least gain of any token to the
    greatest. Of each head it is drawn how far the mean gains of its pairs are from 1.

    Args:
        layers (sequence of LayerGains): what `measure_gains` returns.
        path (Path): the PNG to write; the numbers stand beside it.
    """
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplots(2, 3)
    for row, states in zip(panels, STATES, strict=True):
        having = [one for one in layers if states in one.mean]
        row[0].set_ylabel(f"gain of {states}")
        if not having:
            continue
        _draw_band(row[0], [one.layer for one in having], [_flat(one, states) for one in having], COLOURS[states])
        for pairs in sorted({one.mean[states].shape[-1] for one in having}):  # Gemma 4's layers have two head sizes
            alike = zip(*(_flat(one, states) for one in having if one.mean[states].shape[-1] == pairs), strict=True)
            by_pair = list(zip(*(torch.cat(gains).T for gains in alike), strict=True))
            _draw_band(row[1], range(pairs), by_pair, COLOURS[states])
        row[1].sharey(row[0])
        _draw_heads(figure, row[2], having, states)
    panels[0, 0].set_title("By layer", **TITLE)
    panels[0, 1].set_title("By enhanced pair, low to lowest frequency", **TITLE)
    panels[0, 2].set_title("By head: mean |gain - 1| of its pairs", **TITLE)
    for place in (0, 2):
        panels[1, place].set_xlabel("decoder layer")
    panels[1, 1].set_xlabel("enhanced pair (lowest frequency on the right)")
    header = ("layer", "states", "head", "part", "pair", "mean", "deviation", "least", "greatest")
    save(figure, path, header, _rows(layers))


def _flat(one: LayerGains, states: str) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, least and greatest gains, each `[heads and parts, pairs]`."""
    return tuple(gains[states].flatten(0, 1) for gains in (one.mean, one.least, one.greatest))


def _draw_band(axes: Axes, places: Sequence[int], gains: Sequence[tuple[Tensor, Tensor, Tensor]], colour: str) -> None:
    """Of each place its mean, least and greatest gains, over all that is not told apart there."""
    mean, least, greatest = zip(*gains, strict=True)
    axes.axhline(1, color=REFERENCE, linewidth=0.8, linestyle="--")
    for low, high, alpha in ((least, greatest, 0.15), (mean, mean, 0.35)):
        ends = [float(one.min()) for one in low], [float(one.max()) for one in high]
        axes.fill_between(places, *ends, color=colour, alpha=alpha, linewidth=0)
    axes.plot(places, [float(one.mean()) for one in mean], color=colour, linewidth=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _draw_heads(figure: Figure, axes: Axes, layers: Sequence[LayerGains], states: str) -> None:
    image = axes.imshow(_by_head(layers, states).tolist(), aspect="auto", origin="lower", cmap="Greys", vmin=0)
    figure.colorbar(image, ax=axes)
    axes.set_ylabel(f"head of {states}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _by_head(layers: Sequence[LayerGains], states: str) -> Tensor:
    """How far the mean gains of a head's pairs are from 1, `[heads, layers]`; NaN where a layer has no RoAE or fewer
    heads than another."""
    most = max(len(one.mean[states]) for one in layers)
    distances = torch.full((most, layers[-1].layer + 1), torch.nan, dtype=torch.float64)
    for one in layers:
        distances[: len(one.mean[states]), one.layer] = (one.mean[states] - 1).abs().mean((1, 2))
    return distances


def _rows(layers: Sequence[LayerGains]) -> Iterator[tuple]:
    for one in layers:
        for states, mean in one.mean.items():
            of_all = torch.stack([mean, one.deviation[states], one.least[states], one.greatest[states]], dim=-1)
            for head, parts in enumerate(of_all.tolist()):
                for part, pairs in zip(PARTS, parts, strict=True):
                    for pair, numbers in enumerate(pairs):
                        yield one.layer, states, head, part, pair, *(f"{number:.6g}" for number in numbers)
