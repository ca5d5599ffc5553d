"""NVIDIA's machine code as text (SASS): its instructions, the kinds of work they are, and its loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*?)\s*;", re.MULTILINE)
_KINDS = {
    "tensor": r"U?[HIDQ]MMA|HGMMA|QGMMA|UTC\w*MMA",
    "special": r"MUFU",
    "barrier": r"BAR",
    "load": r"LDG",
    "store": r"STG",
    "atomic": r"ATOMG?|RED|REDG",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "shuffle": r"SHFL",
    "local": r"LDL|STL",
}
_KIND_OF = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}


class Instruction(NamedTuple):
    """One instruction, such as `@!P0 LDG.E.128 R4, [R26.64]`: where, under which guard, what, on what."""

    address: int
    guard: str | None
    name: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def kind(self) -> str | None:
        """Which kind of work it is, a key of `_KINDS`; None for ordinary arithmetic and the rest."""
        return next((kind for kind, pattern in _KIND_OF.items() if pattern.fullmatch(self.base)), None)

    @property
    def jumps(self) -> bool:
        """Whether it may go on elsewhere than at the next one. (BRA.DIV does where threads are apart, not here.)"""
        return self.base in ("BRA", "CALL", "RET", "EXIT") and not self.name.startswith("BRA.DIV")

    @property
    def bytes(self) -> int:
        """Bytes that a thread loads, stores or exchanges; 0 for what touches no memory."""
        if self.kind not in ("load", "store", "shared", "shuffle", "local", "atomic"):
            return 0
        if self.base in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits, four bytes of each a thread
            return 4 * int(self.name[-1]) if self.name[-2:] in (".2", ".4") else 4
        modifiers = self.name.split(".")
        for width in (256, 128, 64):
            if str(width) in modifiers:
                return width // 8
        return 1 if {"U8", "S8"} & {*modifiers} else 2 if {"U16", "S16"} & {*modifiers} else 4

    @property
    def flops(self) -> int:
        """Floating-point operations of a warp on the tensor cores, two for each product that is added."""
        if self.kind != "tensor":
            return 0
        if shape := re.search(r"\.(\d+)x(\d+)x(\d+)\b", self.name):  # HGMMA, of four warps: a quarter each
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k // 4
        shape = re.search(r"\.(\d{3,})\b", self.name).group(1)  # 1688 or 16816: all have 8 columns
        return 2 * 16 * 8 * int(shape[3:])


class Operands(NamedTuple):
    """An instruction's operands by their part: registers and predicates that it sets, sources and predicates that it
    reads."""

    registers: tuple[str, ...]
    predicates: tuple[str, ...]
    sources: tuple[str, ...]
    conditions: tuple[str, ...]


class Loop(NamedTuple):
    """A loop's addresses, and how many instructions of each kind its body has; "all" counts every one of them."""

    first: int
    last: int
    counts: Counter[str]


def instructions(sass: str) -> list[Instruction]:
    """The instructions in cuobjdump's text of one kernel.

    Raises:
        ValueError: there are none.
    """
    found = [
        Instruction(int(address, 16), guard or None, name, tuple(o.strip() for o in operands.split(",") if o.strip()))
        for address, guard, name, operands in _LINE.findall(sass)
    ]
    if not found:
        raise ValueError("this is no machine code: expected the text of cuobjdump --dump-sass")
    return found


def is_predicate(operand: str) -> bool:
    """Whether an operand is a predicate, such as P0, !UP1 or PT."""
    return re.fullmatch(r"!?U?P(\d|T)", operand) is not None


@cache
def operands(i: Instruction) -> Operands:
    """Sorts the operands: first come the register and the predicates that are set, in either order."""
    given = list(i.operands)
    if i.base == "R2P":  # sets any of them
        return Operands((), tuple(f"P{n}" for n in range(7)), tuple(given), ())
    registers: tuple[str, ...] = ()
    predicates = []
    most = 0 if i.base.endswith(("SEL", "MNMX")) else 1 if i.base.startswith("VOTE") else 2
    sets_register = not i.base.endswith(("SETP", "PLOP3")) and not i.base.startswith(("ST", "RED"))
    while given:
        if is_predicate(given[0]) and len(predicates) < most:
            predicates.append(given.pop(0))
        elif sets_register and not registers and (match := re.fullmatch(r"(U?R)(\d+|Z)", given[0])):
            first = given.pop(0)
            registers = (first,)
            if match[2] != "Z":
                registers = tuple(f"{match[1]}{int(match[2]) + n}" for n in range(_words_set(i)))
        else:
            break
    registers = tuple(r for r in registers if not r.endswith("Z"))
    sources = tuple(o for o in given if not is_predicate(o))
    return Operands(registers, tuple(predicates), sources, tuple(o for o in given if is_predicate(o)))


def _words_set(i: Instruction) -> int:
    """How many registers an instruction sets from the one that it names on."""
    modifiers = {*i.name.split(".")}
    if i.base == "F2F":  # of two types, the result's stands first
        modifiers.discard(i.name.split(".")[-1])
    if i.kind == "tensor" or modifiers & {"128", "M88", "MT88"}:
        return 4
    return 2 if modifiers & {"64", "WIDE", "F64"} or (i.base == "CS2R" and "32" not in modifiers) else 1


def target(instruction: Instruction) -> int | None:
    """Where an instruction may jump to by its text; None for one that goes on to the next."""
    if not instruction.jumps or instruction.base in ("EXIT", "RET"):
        return None
    return int(next(o for o in instruction.operands if o.startswith("0x")), 16)


def count(code: Sequence[Instruction]) -> Counter[str]:
    """How many instructions of each kind there are, and "all"."""
    kinds = Counter(i.kind for i in code if i.kind)
    kinds["all"] = len(code)
    return kinds


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loops, in the order of their addresses: what a jump backwards spans. One that was unrolled is not there."""
    spans: dict[int, int] = {}
    for i in code:
        to = target(i) if i.base == "BRA" else None
        if to is not None and to < i.address:
            spans[to] = max(i.address, spans.get(to, 0))
    bodies = {span: [i for i in code if span[0] <= i.address <= span[1]] for span in sorted(spans.items())}
    return [Loop(*span, count(body)) for span, body in bodies.items()]
