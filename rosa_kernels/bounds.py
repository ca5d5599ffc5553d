"""What bounds a launch, read off its machine code: how often each part of the GPU is needed, and how long that takes.

Each time is a floor: that part of every multiprocessor busy all the time, at its datasheet rate, and nothing else in
the way. Left out is what only a GPU shows: latency and what hides it, the last wave of programs, caches (memory counts
each tensor once, however often it is read), bank conflicts, instructions issued again, and the ordinary arithmetic
units, among them those of conversions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

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
from rosa_kernels.machine_code import instructions, loops
from rosa_kernels.walk import WARP, Walk, walk


class Floors(NamedTuple):
    """Nanoseconds a token of each part, None where a rate is not published: memory, issue slots, shared memory with
    load/store units, tensor cores, special functions."""

    memory: float
    issue: float | None
    shared: float | None
    tensor: float | None
    special: float | None

    @property
    def largest(self) -> str:
        """The part that takes longest."""
        return max((time, part) for part, time in self._asdict().items() if time is not None)[1]


def argument_words(signature: dict[str, str], arguments: dict[str, Any], arch: str) -> dict[int, int]:
    """A launch's arguments as words by their address in constant bank 0, for `walk`.

    `signature` gives the types as Triton has them, such as "i32", in the kernel's order. Each tensor lies by itself, at
    a multiple of 2^48.
    """
    major = int(arch.removeprefix("sm_")) // 10
    address = 0x160 if major < 9 else 0x210 if major == 9 else 0x380  # where the driver puts a kernel's arguments
    words = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            continue
        value = i << 48 if kind.startswith("*") else arguments[name]
        size = 4 if kind == "i32" else 8
        address += -address % size
        words |= {address + 4 * n: value >> 32 * n & 0xFFFFFFFF for n in range(size // 4)}
        address += size
    return words


def follow(launch, signature: dict[str, str], sass: str, arch: str) -> Walk:
    """What a launch executes of its machine code on `arch`.

    Raises:
        ValueError: a branch depends on what is not known from the launch's arguments.
    """
    words = argument_words(signature, launch.arguments, arch)
    return walk(instructions(sass), words, launch.programs, launch.num_warps)


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


def chain(walked: Walk) -> tuple[int, ...]:
    """The trips, loop by loop, of the program that does the most of them one after the other."""
    starts = [loop.first for loop in loops(walked.code)]
    rows = [n for n, i in enumerate(walked.code) if i.address in starts]
    trips = torch.stack([kind.visits[rows] for kind in walked.kinds])
    longest = trips[trips.sum(1).argmax()].tolist()
    return tuple(n for n in longest if n) or (1,)
