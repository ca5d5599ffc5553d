"""What bounds a launch, read off its machine code: how often each part of the GPU is needed, and how long that takes.

Each time is a floor: that part of every multiprocessor busy all the time, at its datasheet rate, and nothing else in
the way. Left out is what only a GPU shows: latency and what hides it, the last wave of programs, caches (memory counts
each tensor once, however often it is read), bank conflicts, instructions issued again, and the ordinary arithmetic
units, among them those of conversions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.cards import (
    ISSUED_PER_CLOCK,
    REGISTERS,
    REGISTERS_AT_A_TIME,
    SCHEDULERS,
    SHARED_BYTES_PER_CLOCK,
    SHARED_OF_A_PROGRAM,
    SPECIAL_PER_CLOCK,
    Card,
    Multiprocessor,
)
from rosa_kernels.machine_code import Loop, loops
from rosa_kernels.walk import WARP, Walk


class Floors(NamedTuple):
    """Nanoseconds a token of each part, None where a rate is not published: memory, issue slots, shared memory with
    load/store units, tensor cores, special functions."""

    memory: float
    issue: float | None
    shared: float | None
    tensor: float | None
    special: float | None

    @property
    def largest(self) -> str | None:
        """The part that takes longest; None where one is unknown."""
        return None if None in self else max(self._fields, key=self._asdict().get)


def programs_held(registers: int, shared_bytes: int, num_warps: int, of: Multiprocessor) -> int:
    """How many programs a multiprocessor holds at once, by registers a thread and shared memory a program."""
    per_warp = -(-registers * WARP // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    warps = min(REGISTERS // SCHEDULERS // per_warp * SCHEDULERS, of.warps)
    return min(warps // num_warps, of.programs, of.shared_bytes // (shared_bytes + SHARED_OF_A_PROGRAM))


def floors(walked: Walk, bytes_moved: float, card: Card) -> Floors:
    """The floors of a whole launch on a card, in nanoseconds; `bytes_moved` to and from memory."""
    flops = sum(int(n) * i.flops for i, n in zip(walked.code, walked.issued, strict=True))
    special = sum(int(n) for i, n in zip(walked.code, walked.issued, strict=True) if i.kind == "special")
    per_second = None if card.clock is None else card.clock * card.multiprocessors
    units = card.multiprocessor.load_store_units

    def clocks(number: float, per_clock: float) -> float | None:
        return None if per_second is None else number / per_clock / per_second * 1e9

    return Floors(
        memory=bytes_moved / card.bandwidth * 1e9,
        issue=clocks(int(walked.issued.sum()), ISSUED_PER_CLOCK),
        shared=None if units is None else clocks(_accesses(walked, units), 1),
        tensor=None if card.tensor_flops is None else flops / card.tensor_flops * 1e9,
        special=clocks(special * WARP, SPECIAL_PER_CLOCK),
    )


def _accesses(walked: Walk, units: int) -> float:
    """Clocks of a multiprocessor's load/store units and shared memory, which cached loads go through too: of each
    instruction the longer of what its threads and its bytes take. A shuffle is one clock a warp."""
    total = 0.0
    for i, issued, threads in zip(walked.code, walked.issued.tolist(), walked.threads.tolist(), strict=True):
        if i.bytes:
            moved = threads * i.bytes / SHARED_BYTES_PER_CLOCK
            total += moved if i.kind == "shuffle" else max(moved, issued * WARP / units)
    return total


class Trips(NamedTuple):
    """A loop of a launch's machine code, its trips in all programs together, and in the one that does most of them.

    A program's first trip counts too. Warps do the trips of their program each.
    """

    loop: Loop
    total: int
    most: int


def trips(walked: Walk) -> list[Trips]:
    """Every loop and its trips, in the order of the machine code. A loop that was unrolled is not there."""
    programs, visits, found = _visits_of_loops(walked)
    return [Trips(loop, int(row @ programs), int(row.max())) for loop, row in zip(found, visits.T, strict=True)]


def chain(walked: Walk) -> tuple[int, ...]:
    """The trips, loop by loop, of the program that does the most of them one after the other; of none, one."""
    _, visits, _ = _visits_of_loops(walked)
    longest = visits[visits.sum(1).argmax()].tolist()
    return tuple(n for n in longest if n) or (1,)


def _visits_of_loops(walked: Walk) -> tuple[Tensor, Tensor, list[Loop]]:
    """Programs of each kind, how often one of each comes by the beginning of each loop, and the loops."""
    found = loops(walked.code)
    row = {i.address: n for n, i in enumerate(walked.code)}
    visits = torch.stack([kind.visits for kind in walked.kinds])[:, [row[loop.first] for loop in found]]
    return torch.tensor([kind.programs for kind in walked.kinds]), visits, found
