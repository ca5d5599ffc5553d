"""The speed that RoSA aims at, as ratios within one run, and what the rows say about them: met or missed, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.liger import LIGER
from benchmarks.results import Machine, Row
from benchmarks.tables import HEADINGS, bandwidth_share, markdown

LARGE = 4096  # tokens from which the ops' ratios count: 2 x 2048
LONG = 16384


class Target(NamedTuple):
    """A ratio of two rows' values, or a share of a copy's bandwidth, that is to be at least or at most `goal`."""

    text: str
    goal: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.goal if self.at_least else value <= self.goal

    def miss(self, value: float) -> float:
        """By how much of the goal the value misses it."""
        return (self.goal - value if self.at_least else value - self.goal) / self.goal


class Outcome(NamedTuple):
    """What was measured for a target at one place, and what bounds it there if the target is missed.

    The value is None, and no place named, where no rows tell of the target.
    """

    target: Target
    place: str
    value: float | None
    bound: str


def outcomes(machine: Machine) -> list[Outcome]:
    """The outcome of every target, where it is furthest from met."""
    return [
        max(measured, key=lambda o: o.target.miss(o.value), default=Outcome(target, "", None, ""))
        for target, measured in (*_ops(machine), *_training(machine))
    ]


def table(machine: Machine) -> str:
    """The outcomes in Markdown."""
    rows = [
        (o.target.text, o.place, "not measured", "", "")
        if o.value is None
        else (o.target.text, o.place, f"{o.value:.3g}", "met" if o.target.met(o.value) else _missed(o), o.bound)
        for o in outcomes(machine)
    ]
    header = ("target", "furthest from it", "measured", "", "bound, as far as the rows tell, by")
    return f"**Targets on {machine.device}**\n\n{markdown(header, rows)}"


def _missed(outcome: Outcome) -> str:
    return f"missed by {outcome.target.miss(outcome.value):.0%}"


def _ops(machine: Machine) -> Iterator[tuple[Target, list[Outcome]]]:
    for group, provider, goal in (
        ("rope_roae", "eager", 8.0),
        ("rope_roae", "compiled", 1.3),
        ("rope_roae", "huggingface", 3.0),
        ("roae", "eager", 8.0),
        ("roae", "compiled", 1.3),
    ):
        target = Target(f"`{group}` at least {goal:g}x as fast as {HEADINGS[provider]}", goal, at_least=True)
        yield (
            target,
            [
                _outcome(machine, target, ours, theirs["milliseconds"] / ours["milliseconds"])
                for ours, theirs in _pairs(machine, group, provider)
            ],
        )
    target = Target("`rope_roae` within 1.25x of Liger's plain RoPE", 1.25, at_least=False)
    yield (
        target,
        [
            _outcome(machine, target, ours, ours["milliseconds"] / theirs["milliseconds"])
            for ours, theirs in _pairs(machine, "rope_roae", "liger")
        ],
    )
    target = Target(f"`rope_roae` at 90 % of a copy's bandwidth, {LONG:,} tokens", 0.9, at_least=True)
    yield (
        target,
        [
            _outcome(machine, target, row, share)
            for row in machine.rows("rope_roae", provider="fused", mode="both")
            if row["batch"] * row["seq"] >= LONG
            and (share := bandwidth_share(row, machine.rate("rope_roae", "bytes"))) is not None
        ],
    )


def _pairs(machine: Machine, group: str, provider: str) -> Iterator[tuple[Row, Row]]:
    """The fused op's row and the provider's at every large case that has both."""
    for ours in machine.rows(group, provider="fused", mode="both"):
        labels = {label: ours[label] for label in ("shape", "batch", "seq")}
        theirs = machine.find(group, provider=provider, mode="both", **labels)
        if theirs is not None and ours["batch"] * ours["seq"] >= LARGE:
            yield ours, theirs


def _training(machine: Machine) -> Iterator[tuple[Target, list[Outcome]]]:
    for (text, provider, quantity, goal), end in itertools.product(
        (
            ("RoSA skip within 1.05x of the frozen floor's time", "frozen floor", "milliseconds", 1.05),
            ("RoSA skip at most 0.75x of LoRA's time", "LoRA r=16", "milliseconds", 0.75),
            ("RoSA skip at no more memory than LoRA", "LoRA r=16", "peak_bytes", 1.0),
        ),
        ("", LIGER),  # like with like
    ):
        target, measured = Target(f"{text}{end}", goal, at_least=False), []
        for ours in machine.rows("training_step", provider=f"RoSA skip{end}"):
            labels = {label: ours[label] for label in ("shape", "batch", "seq")}
            theirs = machine.find("training_step", provider=f"{provider}{end}", **labels)
            if theirs and theirs[quantity] and ours[quantity]:
                outcome = _outcome(machine, target, ours, ours[quantity] / theirs[quantity])
                measured.append(outcome if quantity == "milliseconds" else outcome._replace(bound=""))
        yield target, measured


def _outcome(machine: Machine, target: Target, row: Row, value: float) -> Outcome:
    reason = "" if target.met(value) else bound(machine, row)
    return Outcome(target, f"{row['shape']}, {row['batch']} x {row['seq']:,}", value, reason)


def bound(machine: Machine, row: Row) -> str:
    """What bounds a row's time, as far as the rows tell.

    Launches, if fewer tokens take hardly less time; bandwidth or arithmetic, if the time is mostly what a copy of the
    bytes, or the base model's matrix products, take at the rates measured in the same run.
    """
    tokens = row["batch"] * row["seq"]
    alike = machine.rows(row["group"], provider=row["provider"], mode=row["mode"], shape=row["shape"])
    fewest = min(alike, key=lambda r: r["batch"] * r["seq"])
    growth, fold = row["milliseconds"] / fewest["milliseconds"], tokens / (fewest["batch"] * fewest["seq"])
    if fold >= 4 and growth < 1.5:
        return f"launches: {fold:.0f}x fewer tokens take {1 / growth:.0%} of the time"
    share = bandwidth_share(row, machine.rate(row["group"], "bytes"))
    if share is not None and share >= 0.6:
        return f"bandwidth: {share:.0%} of a copy's"
    rate = machine.rate(row["group"], "flops")
    if rate is not None and row.get("flops"):
        part = row["flops"] / rate / (row["milliseconds"] / 1e3)
        return f"arithmetic: the base's matrix products are {part:.0%}" if part >= 0.6 else (
            f"the base's matrix products are only {part:.0%}: launches or bandwidth, the rows do not tell which"
        )  # fmt: skip
    if share is not None:
        return f"neither launches nor bandwidth ({share:.0%} of a copy's): arithmetic or latency within the kernel"
    return "the rows do not tell"
