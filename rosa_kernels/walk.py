"""Walks through a launch's machine code and counts how often each instruction is issued.

What decides where a kernel goes is whole numbers: its arguments, the number of the program, that of the thread, and how
many programs were at a counter before. Their arithmetic is done here, for all programs at once, and whatever else is
computed or loaded is unknown. So the trips of every loop and the turn of every branch are those of the launch, whatever
the compiler made of them, and no kernel has to say them. A branch on something unknown is an error.

A first walk, of one thread a program, tells which programs go the same way; a second one takes every thread of one
program of each kind. Threads wait for each other as on the GPU: those at the lowest address go first.
"""

from __future__ import annotations

import re
import struct
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosa_kernels.machine_code import Instruction, is_predicate, operands, target
from rosa_kernels.word_arithmetic import OPERATIONS, WORD

WARP = 32
MAX_STEPS = 300_000  # of one walk: a launch of this package takes some thousands

Value = (
    Tensor | int | None
)  # int64, one a thread or one for all: a word, a truth, or -1 where unknown; None: all unknown


class Kind(NamedTuple):
    """Programs of a launch that go the same way: how many, and how often one of them comes by each instruction."""

    programs: int
    visits: Tensor


class Walk(NamedTuple):
    """How often, over all programs of a launch, warps issue each instruction, and threads carry it out."""

    code: Sequence[Instruction]
    kinds: list[Kind]
    issued: Tensor
    threads: Tensor


def argument_words(kinds: Sequence[str], values: Sequence[Any], arch: str) -> dict[int, int]:
    """A launch's arguments as words by their address in constant bank 0, as `walk` takes them.

    `kinds` are the types as Triton has them, such as "i32", in the kernel's order. Each tensor lies by itself, at a
    multiple of 2^48.
    """
    major = int(arch.removeprefix("sm_")) // 10
    address = 0x160 if major < 9 else 0x210 if major == 9 else 0x380  # where the driver puts a kernel's arguments
    words = {}
    for i, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            value = i << 48
        elif kind == "fp64":
            value = int.from_bytes(struct.pack("<d", value), "little")
        size = 4 if kind == "i32" else 8
        address += -address % size
        words |= {address + 4 * n: value >> 32 * n & WORD for n in range(size // 4)}
        address += size
    return words


def walk(code: Sequence[Instruction], words: dict[int, int], programs: int, num_warps: int) -> Walk:
    """Counts what a launch of `programs` executes.

    Args:
        code: the kernel's instructions.
        words: its arguments as 32-bit words, by their address in constant bank 0; tensors lie at made-up addresses.
        programs: how many programs are launched, each of `num_warps` warps.

    Raises:
        ValueError: a branch depends on what is not known before the launch.
    """
    one_each = _Threads(code, words, torch.arange(programs), 1)
    visits, carried = one_each.run(1)
    ways = [column.numpy().tobytes() for column in torch.cat([visits, carried]).T.contiguous()]
    numbers = Counter(ways)
    first = torch.tensor([ways.index(way) for way in numbers])
    every = _Threads(code, words, first, num_warps * WARP, one_each.arrivals)
    weights = torch.tensor([*numbers.values()])
    issued, threads = (t.view(len(code), len(first), -1).sum(2) @ weights for t in every.run(WARP))
    return Walk(code, [Kind(int(n), visits[:, i].long()) for n, i in zip(weights, first, strict=True)], issued, threads)


class _Threads:
    """The first `each` threads of programs, at the kernel's beginning.

    `arrivals` is what an earlier walk saw at counters: for each program, what its first thread found there each time.
    """

    def __init__(
        self, code: Sequence[Instruction], words: dict[int, int], programs: Tensor, each: int,
        arrivals: dict[int, list[int]] | None = None,
    ) -> None:  # fmt: skip
        self.code, self.words, self.each = code, words, each
        self.index = {i.address: n for n, i in enumerate(code)}
        self.program, self.thread = programs.repeat_interleave(each), torch.arange(each).repeat(len(programs))
        self.count = len(self.program)
        self.lane = self.thread % WARP
        self.special = {
            "SR_CTAID.X": self.program, "SR_TID.X": self.thread,
            "SR_LANEID": self.lane, "SR_LTMASK": (1 << self.lane) - 1,
        }  # fmt: skip
        self.special |= dict.fromkeys(("SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId", "RZ", "URZ", "SRZ"), 0)
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, Value] = {}
        self.shared: dict[int, Value] = {}  # the single words that a program's threads hand to each other
        self.counters: dict[int, int] = defaultdict(int)
        self.arrivals: dict[int, list[int]] = defaultdict(list)
        self.known_arrivals = arrivals and {program: iter(seen) for program, seen in arrivals.items()}

    def run(self, width: int) -> tuple[Tensor, Tensor]:
        """How often each instruction is visited by any of every `width` threads, and by how many whose guard lets them:
        `[instructions, threads / width]` each."""
        visits, carried = torch.zeros(2, len(self.code), self.count // width, dtype=torch.int32)
        waiting = {self.code[0].address: torch.ones(self.count, dtype=torch.bool)}
        before = None
        for _ in range(MAX_STEPS):
            if not waiting:
                return visits, carried
            address = min(waiting)
            here = waiting.pop(address)
            n = self.index[address]
            instruction = self.code[n]
            if here is not before:  # mostly the same threads go on
                before, any_here, all_here = here, here.view(-1, width).any(1), here.view(-1, width).sum(1)
            visits[n] += any_here
            guard = self.predicate(instruction.guard)
            let = here if instruction.guard is None or guard is None else here & (torch.as_tensor(guard) != 0)
            carried[n] += all_here if let is here else let.view(-1, width).sum(1)
            if not instruction.jumps:
                self.step(instruction, let, guard)
                _wait(waiting, self.code[n + 1].address, here)
                continue
            taken = self.taken(instruction, here)
            if instruction.base != "EXIT":
                _wait(waiting, self.destination(instruction, taken), taken)
            if (~taken & here).any():
                _wait(waiting, self.code[n + 1].address, here & ~taken)
        raise ValueError(f"no end after {MAX_STEPS} steps")

    def taken(self, jump: Instruction, here: Tensor) -> Tensor:
        """Which of the threads `here` take a jump."""
        for condition in (jump.guard, *filter(is_predicate, jump.operands)):
            value = self.predicate(condition)
            if value is None or (isinstance(value, Tensor) and (value[here] < 0).any()):
                raise ValueError(f"a branch depends on what is not known before the launch: {jump}")
            here = here & (torch.as_tensor(value) > 0)
        return here

    def destination(self, jump: Instruction, taken: Tensor) -> int:
        to = target(jump)
        if to is None:  # a return, to where a register says
            back = self.read(jump.operands[0])
            addresses = torch.as_tensor(-1 if back is None else back).expand(self.count)[taken].unique()
            to = int(addresses[0]) if len(addresses) == 1 else -1
        if to not in self.index:
            raise ValueError(f"a jump to where no instruction is known: {jump}")
        return to

    def predicate(self, name: str | None) -> Value:
        if name is None or name in ("PT", "UPT"):
            return 1
        if name in ("!PT", "!UPT"):
            return 0
        value = self.predicates.get(name.removeprefix("!"))
        if value is None or name[0] != "!":
            return value
        return 1 - value if isinstance(value, int) else torch.where(value < 0, -1, 1 - value)

    def read(self, operand: str, n: int = 0) -> Value:
        """Word n of an operand; -x is 2^32 - x, up to 2^32."""
        sign, place, number = _parsed(operand)
        if place == "number":
            return number >> 32 * n & WORD
        if place == "constant":
            value = self.words.get(number + 4 * n)
        elif place in ("R", "UR"):
            value = self.registers.get(f"{place}{number + n}")
        else:
            value = self.special.get(place)
        if value is None or not sign:
            return value
        negative = (WORD + 1 if sign == "-" else WORD) - value
        return negative if isinstance(value, int) else torch.where(value < 0, -1, negative)

    def step(self, i: Instruction, who: Tensor, guard: Value) -> None:
        """The threads `who` carry out an instruction that does not jump."""
        named = operands(i)
        if i.base == "STS":
            self.store_shared(i, who)
        if not named.registers and not named.predicates:
            return
        words, truths = self.results(i, who)
        if guard is None or (isinstance(guard, Tensor) and (guard < 0).any()):
            words, truths = [], []  # who knows which threads
        self.write(self.registers, named.registers, words, who)
        self.write(self.predicates, named.predicates, truths, who)

    def write(self, kept: dict[str, Value], names: Sequence[str], values: list[Value], who: Tensor) -> None:
        for n, name in enumerate(names):
            value, old = values[n] if n < len(values) else None, kept.get(name)
            if value is None and old is None:
                continue
            if not who.all():
                value = torch.where(who, -1 if value is None else value, -1 if old is None else old)
            kept[name] = value

    def results(self, i: Instruction, who: Tensor) -> tuple[list[Value], list[Value]]:
        """The words and truths that an instruction sets; those left out are unknown."""
        named, modifiers = operands(i), {*i.name.split(".")[1:]}
        if i.base in ("S2R", "S2UR", "R2UR", "MOV", "UMOV", "LDC", "LDCU", "ULDC", "CS2R"):
            return [self.read(named.sources[0], n) for n in range(len(named.registers))], []
        if i.base == "HFMA2":
            return _halves(named.sources), []
        if i.base == "LDS" and i.bytes == 4:
            return [self.shared.get(self.address(named.sources[0]))], []
        if i.base == "ATOMG" and "ADD" in modifiers:
            return [self.arrive(named.sources, who)], []
        if i.base in ("VOTE", "VOTEU") and named.conditions == ("PT",):  # which threads are here
            masks = torch.where(who, 1 << self.lane, 0).view(-1, min(self.each, WARP)).sum(1)
            return [masks.repeat_interleave(min(self.each, WARP))], []
        if i.base == "SHFL" and "IDX" in modifiers:
            return [self.from_lane(*(self.read(source) for source in named.sources[:2]))], []
        operation = OPERATIONS.get(i.name) or OPERATIONS.get(i.base) or OPERATIONS.get(i.base.removeprefix("U"))
        if operation is None:
            return [], []
        low = [self.read(source) for source in named.sources]
        high, needed = [], low
        if "WIDE" in modifiers or (i.base == "IMAD" and "HI" in modifiers):  # words plus a number of 64 bits
            high = [0, 0, self.read(named.sources[2], 1)]
            needed = [*low, high[2]]
        elif modifiers & {"64", "U64", "S64"}:
            high = [self.read(source, 1) for source in named.sources]
            needed = [*low, *high]
            if any(re.match(r"[-~]U?R", source) for source in named.sources):
                return [], []
        conditions = [self.predicate(condition) for condition in named.conditions]
        if i.base == "P2R":  # sources: PR, a word, and which of the predicates go into it
            low = needed = low[1:]
            conditions = [self.predicate(f"P{n}") if int(low[1]) >> n & 1 else 0 for n in range(7)]
        needed = [*needed, *conditions]
        if any(value is None for value in needed):
            return [], []
        unknown = reduce(or_, (value for value in needed if isinstance(value, Tensor)), 0) < 0
        words, truths = operation(modifiers, low, high, conditions)
        return [_unless(unknown, word) for word in words], [_unless(unknown, truth) for truth in truths]

    def from_lane(self, value: Value, lane: Value) -> Value:
        """What another lane of a thread's warp has, unknown where that lane is not walked."""
        if value is None or lane is None:
            return None
        width = min(self.each, WARP)
        value, lane = (torch.as_tensor(x).expand(self.count).view(-1, width) for x in (value, lane))
        here = (lane >= 0) & (lane < width)
        return torch.where(here, value.gather(1, lane.clamp(0, width - 1)), -1).view(-1)

    # Programs that count themselves, so that the last one knows that it is: `tl.atomic_add` is done by the first thread
    # of a program, which hands what it found to the others by a word of shared memory.

    def arrive(self, sources: Sequence[str], who: Tensor) -> Value:
        """What the threads `who` find at the counters that they add to."""
        address, added = sources[-2:]
        place, offset = re.fullmatch(r"(?:desc\[\w+\])?\[(U?R\w+?)(?:\.64)?(?:\+(0x[0-9a-f]+))?\]", address).groups()
        words = [self.read(place), self.read(place, 1), self.read(added)]
        if any(word is None for word in words):
            return None
        low, high, added = (torch.as_tensor(word).expand(self.count).tolist() for word in words)
        found = torch.full((self.count,), -1)
        for lane in (who & (self.thread == 0)).nonzero()[:, 0].tolist():
            program = int(self.program[lane])
            if min(low[lane], high[lane], added[lane]) < 0:
                continue
            if self.known_arrivals is None:
                counter = (high[lane] << 32 | low[lane]) + int(offset or "0", 16)
                self.arrivals[program].append(self.counters[counter])
                self.counters[counter] += added[lane]
                found[lane] = self.arrivals[program][-1]
            else:
                found[lane] = next(self.known_arrivals[program])
        return found

    def store_shared(self, i: Instruction, who: Tensor) -> None:
        """Keeps a word that one thread of each program stores at one address; data, of many threads, is not kept."""
        address, value = self.address(i.operands[0]), self.read(i.operands[1])
        if address is None:
            return
        stores = who.view(-1, self.each)
        if value is None or i.bytes != 4 or (stores.sum(1) > 1).any():
            self.shared.pop(address, None)
            return
        value = torch.as_tensor(value).expand(self.count).view(-1, self.each)
        handed = torch.where(stores, value, -1).amax(1)
        self.shared[address] = handed.repeat_interleave(self.each)

    def address(self, operand: str) -> int | None:
        """The address in shared memory that all threads have in common, None where each has its own."""
        match = re.fullmatch(r"\[(U?R\w+)?\+?(0x[0-9a-f]+)?\]", operand)
        base = None if match is None else self.read(match[1]) if match[1] else 0
        return base + int(match[2] or "0", 16) if isinstance(base, int) else None


@cache
def _parsed(operand: str) -> tuple[str, str, int]:
    """The sign before an operand, where it stands (a number, a constant, a kind of register, or a name), which."""
    sign = operand[0] if operand[0] in "-~" else ""
    name = operand.removeprefix(sign).removesuffix(".reuse")
    if re.fullmatch(r"0x[0-9a-f]+", name):
        return "", "number", int(sign.replace("~", "") + name, 16)
    if match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", name):
        return sign, "constant", int(match[1], 16)
    if match := re.fullmatch(r"(U?R)(\d+)", name):
        return sign, match[1], int(match[2])
    return sign, name, 0


def _wait(waiting: dict[int, Tensor], address: int, who: Tensor) -> None:
    if address in waiting:
        waiting[address] = waiting[address] | who
    elif who.any():
        waiting[address] = who


def _unless(unknown: bool | Tensor, value: Tensor | int) -> Value:
    if isinstance(unknown, bool):
        return value.long() if isinstance(value, Tensor) else int(value)
    return torch.where(unknown, -1, value.long() if isinstance(value, Tensor) else int(value))


def _halves(sources: Sequence[str]) -> list[Value]:
    """The word of two float16 constants, where 0 * 0 + constants is all that is computed."""
    *zeros, first, second = sources
    if not all(zero in ("RZ", "-RZ") for zero in zeros) or re.search(r"[A-Z]", first + second):
        return []
    high, low = (int(torch.tensor(float(x), dtype=torch.half).view(torch.int16)) & 0xFFFF for x in (first, second))
    return [high << 16 | low]
