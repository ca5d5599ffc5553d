"""Walks through a launch's machine code and counts how often each instruction is issued.

What decides where a kernel goes is whole numbers: its arguments, the number of the program, that of the thread. Their
arithmetic is done here, for all programs at once, and whatever else is computed or loaded is unknown. So the trips of
every loop and the turn of every branch are those of the launch, whatever the compiler made of them, and no kernel has
to say them. A branch on something unknown is an error.

A first walk, of one thread a program, tells which programs go the same way; a second one takes every thread of one
program of each kind. Threads wait for each other as on the GPU: those at the lowest address go first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.machine_code import Instruction, target

WARP = 32
MAX_STEPS = 1_000_000  # of one walk: a launch of this package takes some thousands
_WORD = (1 << 32) - 1
_NOTHING = ("BSSY", "BSYNC", "WARPSYNC", "NOP", "BAR", "YIELD", "DEPBAR", "BREAK", "BMOV", "MEMBAR", "ERRBAR", "CCTL")
_COMPARE = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}

Value = Tensor | int | None  # int64, one for each thread or one for all: a word, or -1 where unknown; None: all unknown


class Kind(NamedTuple):
    """Programs of a launch that go the same way: how many, and how often one of them comes by each instruction."""

    programs: int
    visits: Tensor


class Walk(NamedTuple):
    """How often, over all programs of a launch, warps issue each instruction, and threads carry it out."""

    code: Sequence[Instruction]
    issued: Tensor
    threads: Tensor
    kinds: list[Kind]


def walk(code: Sequence[Instruction], words: dict[int, int], programs: int, num_warps: int) -> Walk:
    """Counts what a launch of `programs` executes.

    Args:
        code: the kernel's instructions.
        words: its whole-number arguments as 32-bit words, by their address in constant bank 0.
        programs: how many programs are launched, each of `num_warps` warps.

    Raises:
        ValueError: a branch depends on what is not known from the arguments.
    """
    visits, _ = _Threads(code, words, torch.arange(programs), torch.zeros(programs, dtype=torch.long)).run(1)
    first: dict[bytes, int] = {}
    ways = [column.numpy().tobytes() for column in visits.T.contiguous()]
    for i, way in enumerate(ways):
        first.setdefault(way, i)
    numbers = Counter(ways)
    lanes = num_warps * WARP
    thread = torch.arange(lanes).repeat(len(first))
    program = torch.tensor(list(first.values())).repeat_interleave(lanes)
    issued, threads = _Threads(code, words, program, thread).run(WARP)
    weights = torch.tensor([numbers[way] for way in first])
    issued, threads = (t.view(len(code), len(first), num_warps).sum(2) @ weights for t in (issued, threads))
    return Walk(code, issued, threads, [Kind(numbers[way], visits[:, i]) for way, i in first.items()])


class _Threads:
    """Threads of programs, at the kernel's beginning."""

    def __init__(self, code: Sequence[Instruction], words: dict[int, int], program: Tensor, thread: Tensor) -> None:
        self.code, self.words, self.count = code, words, len(program)
        self.index = {i.address: n for n, i in enumerate(code)}
        self.special = {"SR_CTAID.X": program, "SR_TID.X": thread, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_CgaCtaId": 0}
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, Value] = {}

    def run(self, width: int) -> tuple[Tensor, Tensor]:
        """How often each instruction is visited by any of every `width` threads, and by how many whose guard lets them:
        `[instructions, threads / width]` each."""
        visits, let = torch.zeros(2, len(self.code), self.count // width, dtype=torch.long)
        waiting = {self.code[0].address: torch.ones(self.count, dtype=torch.bool)}
        steps = 0
        while waiting:
            address = min(waiting)
            at = waiting.pop(address)
            here = at.view(-1, width).any(1).long()
            while True:
                if address in waiting:
                    at = at | waiting.pop(address)
                    here = at.view(-1, width).any(1).long()
                n = self.index[address]
                instruction = self.code[n]
                steps += 1
                if steps > MAX_STEPS:
                    raise ValueError(f"no end after {MAX_STEPS} steps, at {instruction}")
                guard = self.predicate(instruction.guard)
                let_now = at if guard is None or (isinstance(guard, int) and guard) else at & (guard != 0)
                visits[n] += here
                let[n] += let_now.view(-1, width).sum(1)
                if instruction.base in ("BRA", "CALL", "EXIT", "RET"):
                    break
                self.step(instruction, let_now if let_now is not at or not at.all() else None, guard)
                address = self.code[n + 1].address
            taken = self.taken(instruction, at)
            if instruction.base != "EXIT":
                to = target(instruction) if instruction.base != "RET" else self.returns_to(instruction, taken)
                _wait(waiting, to, taken)
            _wait(waiting, address + self.code[1].address, at & ~taken)
        return visits, let

    def taken(self, instruction: Instruction, at: Tensor) -> Tensor:
        """Which of the threads `at` a jump take it."""
        conditions = (instruction.guard, *(o for o in instruction.operands if _is_predicate(o)))
        for condition in conditions:
            value = self.predicate(condition)
            if value is None or (torch.as_tensor(value).expand(self.count)[at] < 0).any():
                raise ValueError(f"a branch depends on what is not known before the launch: {instruction}")
            at = at & (torch.as_tensor(value).expand(self.count) > 0)
        return at

    def returns_to(self, instruction: Instruction, taken: Tensor) -> int:
        to = torch.as_tensor(self.read(instruction.operands[0])).expand(self.count)[taken].unique()
        if len(to) != 1 or to[0] < 0:
            raise ValueError(f"returns to an unknown place: {instruction}")
        return int(to[0])

    # What the threads know.

    def predicate(self, name: str | None) -> Value:
        if name is None or name in ("PT", "UPT"):
            return 1
        if name in ("!PT", "!UPT"):
            return 0
        value = self.predicates.get(name.removeprefix("!"))
        if value is None or name[0] != "!":
            return value
        return 1 - value if isinstance(value, int) else torch.where(value < 0, -1, 1 - value)

    def read(self, operand: str, high: bool = False) -> Value:
        """The word of an operand, or the second word of one of 64 bits (`high`); -x is 2^32 - x, up to 2^32."""
        sign = operand[0] if operand[0] in "-~" else ""
        name = operand.removeprefix(sign).partition(".reuse")[0]
        if re.fullmatch(r"0x[0-9a-f]+", name):
            return int(sign.replace("~", "") + name, 16) >> 32 * high & _WORD
        if name in ("RZ", "URZ", "SRZ"):
            value = 0
        elif match := re.fullmatch(r"(U?R)(\d+)(?:\.64)?", name):
            value = self.registers.get(f"{match[1]}{int(match[2]) + high}")
        elif match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", name):
            value = self.words.get(int(match[1], 16) + 4 * high)
        else:
            value = self.special.get(name)
        if value is None or not sign:
            return value
        signed = (_WORD + 1 if sign == "-" else _WORD) - value
        return signed if isinstance(value, int) else torch.where(value < 0, -1, signed)

    def write(self, kept: dict[str, Value], name: str, value: Value, who: Tensor | None) -> None:
        """Sets a register or predicate of the threads `who`, or of all."""
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if who is not None:
            old = kept.get(name)
            if value is None and old is None:
                return
            value = torch.where(who, -1 if value is None else value, -1 if old is None else old)
        kept[name] = value

    def step(self, instruction: Instruction, who: Tensor | None, guard: Value) -> None:
        """Carries out an instruction that does not jump."""
        if instruction.base in _NOTHING:
            return
        destinations, predicates, sources, conditions = _sorted_operands(instruction)
        words, truths = self.compute(instruction, sources, [self.predicate(c) for c in conditions])
        if isinstance(guard, Tensor) and (guard < 0).any():
            words = [None] * len(words)
            truths = [None] * len(truths)
        for register, word in zip(destinations, words, strict=False):
            self.write(self.registers, register, word, who)
        for predicate, truth in zip(predicates, truths, strict=False):
            self.write(self.predicates, predicate, truth, who)

    def compute(self, i: Instruction, sources: Sequence[str], conditions: list[Value]) -> tuple[list, list]:
        """The words and truths that an instruction sets: None where it is not arithmetic of whole numbers."""
        nothing = [None] * 4, [None] * 2
        name, *modifiers = i.name.split(".")
        if name in ("S2R", "S2UR", "R2UR", "MOV", "UMOV", "LDC", "LDCU", "ULDC", "CS2R"):
            return [self.read(sources[0])] + [self._word(sources[0], n) for n in range(1, 4)], []
        if name in ("P2R", "R2P"):
            return nothing
        if name in ("HFMA2",) and [s.strip("-") for s in sources[:2]] == ["RZ", "RZ"]:  # sets two halves
            high, low = (int(torch.tensor(float(s), dtype=torch.half).view(torch.int16)) & 0xFFFF for s in sources[2:4])
            return [high << 16 | low], []
        operation = _OPERATIONS.get(name) or _OPERATIONS.get(name.removeprefix("U"))
        if operation is None:
            return nothing
        low = [self.read(s) for s in sources]
        high = [self.read(s, high=True) for s in sources] if {"WIDE", "HI", "64", "U64", "S64"} & {*modifiers} else []
        if name.endswith("SHF") or name.endswith("LEA"):
            high = []
        needed = [*low, *conditions]
        if any(v is None for v in needed):
            return nothing
        if any(v is None for v in high):
            if "WIDE" not in modifiers and "HI" not in modifiers:
                return nothing
            high = [0 if v is None else v for v in high[:-1]] + high[-1:]
            if high[-1] is None:
                return nothing
        unknown = reduce(or_, (v for v in (*needed, *(high[-1:])) if isinstance(v, Tensor)), 0) < 0
        words, truths = operation(set(modifiers), low, high, conditions)
        return [_unless(unknown, word) for word in words], [_unless(unknown, truth) for truth in truths]

    def _word(self, operand: str, n: int) -> Value:
        """Word n of an operand that is read as several: what follows an address in constant bank 0."""
        if match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", operand):
            return self.words.get(int(match[1], 16) + 4 * n)
        return self.read(operand, high=True) if n == 1 else 0


def _wait(waiting: dict[int, Tensor], address: int, who: Tensor) -> None:
    if who.any():
        waiting[address] = waiting[address] | who if address in waiting else who


def _unless(unknown: bool | Tensor, value: Value) -> Value:
    if isinstance(unknown, bool):
        return int(value) if isinstance(value, bool) else value
    return torch.where(unknown, -1, value.long() if isinstance(value, Tensor) else int(value))


def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", operand) is not None


@cache
def _sorted_operands(i: Instruction) -> tuple[list[str], list[str], list[str], list[str]]:
    """Registers and predicates that are set, sources, and predicates that are read."""
    operands = list(i.operands)
    destinations = []
    if operands and (match := re.fullmatch(r"(U?R)(\d+|Z)", operands[0])) and not _sets_predicates_only(i):
        operands.pop(0)
        destinations = [f"{match[1]}{int(match[2]) + n}" for n in range(_words_set(i))] if match[2] != "Z" else []
        if not destinations:
            destinations = ["RZ"]
    predicates = []
    if i.base.removeprefix("U") not in ("SEL", "FSEL", "VIMNMX"):
        while operands and _is_predicate(operands[0]) and (i.base.removeprefix("U") != "PLOP3" or len(predicates) < 2):
            predicates.append(operands.pop(0))
    only_predicates = i.base.endswith(("SETP", "PLOP3", "VOTE", "VOTEU"))
    if predicates and not destinations and not only_predicates and re.fullmatch(r"U?R(\d+|Z)", operands[0]):
        destinations = [operands.pop(0)]  # LOP3 sets a predicate, then a register
    sources = [o for o in operands if not _is_predicate(o)]
    return destinations, predicates, sources, [o for o in operands if _is_predicate(o)]


def _sets_predicates_only(i: Instruction) -> bool:
    return i.base in ("STG", "STS", "STSM", "STL", "RED", "REDG", "R2P")


def _words_set(i: Instruction) -> int:
    modifiers = i.name.split(".")
    if i.kind == "tensor" or "128" in modifiers or "M88" in modifiers or "MT88" in modifiers:
        return 4
    if {"64", "WIDE", "F64"} & {*modifiers} or (i.base == "CS2R" and "32" not in modifiers):
        return 2
    return 1


# Arithmetic of words: what each instruction makes of its modifiers, its sources (their second words) and predicates.


def _signed(x):
    return ((x & _WORD) ^ (1 << 31)) - (1 << 31)


def _pair(low, high):
    return (low & _WORD) | (high & _WORD) << 32


def _add(modifiers, x, x_high, carries):
    if "64" in modifiers:
        total = sum(_pair(*x) for x in zip(x, x_high, strict=True))
        return [total & _WORD, total >> 32 & _WORD], []
    total = sum(x) + (sum(carries) if "X" in modifiers else 0)
    return [total & _WORD], [total >> 32 == 1, total >> 32 == 2]


def _multiply_add(modifiers, x, x_high, carries):
    a, b, c = x
    if modifiers & {"WIDE", "HI"}:
        if "U32" not in modifiers:
            a, b = _signed(a), _signed(b)
        total = a * b + _pair(c, x_high[2])
        return [total & _WORD, total >> 32 & _WORD] if "WIDE" in modifiers else [total >> 32 & _WORD], []
    return [(a * b + c + (sum(carries) if "X" in modifiers else 0)) & _WORD], []


def _logic(modifiers, x, x_high, conditions):
    a, b, c, table = x
    return [word := _lookup(a, b, c, table) & _WORD], [word != 0]


def _lookup(a, b, c, table):
    terms = (
        (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c) for n in range(8) if int(table) >> n & 1
    )
    return reduce(or_, terms, 0)


def _logic_of_predicates(modifiers, x, x_high, conditions):
    a, b, c = conditions[:3]
    return [], [_lookup(a, b, c, table) & 1 for table in x[:2]]


def _compare(modifiers, x, x_high, conditions):
    (a, b), condition = x, conditions[0]
    if modifiers & {"U64", "S64"}:
        a, b = (_pair(*x) for x in zip(x, x_high, strict=True))
    elif "U32" not in modifiers:
        a, b = _signed(a), _signed(b)
    else:
        a, b = a & _WORD, b & _WORD
    name = next(m for m in _COMPARE if m in modifiers)
    truth = _COMPARE[name](a, b)
    if "EX" in modifiers:  # of the higher words: the last condition is what their lower words gave
        lower = conditions[1]
        truth = (truth | (lower > 0)) if name == "NE" else ((a == b) & (lower > 0)) | ((a != b) & truth)
    other = ~truth if isinstance(truth, Tensor) else not truth
    join = (lambda t: t & (condition > 0)) if "AND" in modifiers else (lambda t: t | (condition > 0))
    return [], [join(truth), join(other)]


def _shift(modifiers, x, x_high, conditions):
    low, by, high = x
    if "L" in modifiers:
        if modifiers & {"HI"}:
            return [(_pair(low, high) << by) >> 32 & _WORD], []
        return [low << by & _WORD], []
    if "HI" in modifiers:
        return [(_signed(high) if "S32" in modifiers else high) >> by & _WORD], []
    return [_pair(low, high) >> by & _WORD], []


def _shift_add(modifiers, x, x_high, conditions):
    *x, by = x
    if "HI" not in modifiers:
        total = (x[0] << by & _WORD) + x[1]
        return [total & _WORD], [total >> 32 == 1]
    high = _signed(x[0]) >> 31 if "SX32" in modifiers else x[2]
    total = (_pair(x[0], high) << by >> 32 & _WORD) + x[1] + (sum(conditions) if "X" in modifiers else 0)
    return [total & _WORD], []


def _choose(modifiers, x, x_high, conditions):
    return [_where(conditions[0], x[0], x[1])], []


def _where(condition, a, b):
    if isinstance(condition, Tensor):
        return torch.where(condition > 0, a, b)
    return a if condition else b


def _minimum(modifiers, x, x_high, conditions):
    """Of the last two sources, with the first added to the second of three; the maximum where the predicate says so."""
    *added, b = [v & _WORD if "U32" in modifiers else _signed(v) for v in x]
    a = sum(added)
    least = _where(conditions[-1], _where(a < b, a, b), _where(a < b, b, a))
    return [least & _WORD], []


def _extend(modifiers, x, x_high, conditions):
    a, bits = x
    a = a & ((1 << bits) - 1)
    return [a if "U32" in modifiers else ((a ^ (1 << bits - 1)) - (1 << bits - 1)) & _WORD], []


def _absolute(modifiers, x, x_high, conditions):
    return [abs(_signed(x[0]))], []


def _bits(x):
    """Words as the float32 that they are the bits of."""
    return _signed(torch.as_tensor(x)).to(torch.int32).view(torch.float32)


def _words(x):
    """The bits of float32 as words."""
    return x.float().view(torch.int32).long() & _WORD


# A division by what is known at the launch alone begins with a reciprocal in float32, which is made exact later on.


def _to_float(modifiers, x, x_high, conditions):
    exact = torch.as_tensor(x[0] if "U32" in modifiers else _signed(x[0])).double()
    rounded = exact.float()
    if "RP" in modifiers:
        above = torch.nextafter(rounded, torch.tensor(torch.inf))
        rounded = torch.where(rounded.double() < exact, above, rounded)
    return [_words(rounded)], []


def _reciprocal(modifiers, x, x_high, conditions):
    return [_words(1 / _bits(x[0]))], []


def _to_word(modifiers, x, x_high, conditions):
    return [_bits(x[0]).double().nan_to_num().clamp(0, _WORD).long()], []


_OPERATIONS = {
    "IADD3": _add, "IADD": _add, "VIADD": _add, "IMAD": _multiply_add, "LOP3": _logic, "PLOP3": _logic_of_predicates,
    "ISETP": _compare, "SHF": _shift, "LEA": _shift_add, "SEL": _choose, "IMNMX": _minimum, "VIMNMX": _minimum,
    "VIADDMNMX": _minimum, "SGXT": _extend, "IABS": _absolute, "I2F": _to_float, "MUFU": _reciprocal, "F2I": _to_word,
    "VOTE": lambda modifiers, x, x_high, conditions: ([], [conditions[0]]),
}  # fmt: skip
