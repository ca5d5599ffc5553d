"""NVIDIA's machine code as text (SASS): its instructions, the kinds of work they are, and its loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
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


def target(instruction: Instruction) -> int | None:
    """Where an instruction may jump to by its text; None for one that goes on to the next."""
    if instruction.base not in ("BRA", "CALL"):
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
        to = target(i)
        if to is not None and to < i.address:
            spans[to] = max(i.address, spans.get(to, 0))
    bodies = {span: [i for i in code if span[0] <= i.address <= span[1]] for span in sorted(spans.items())}
    return [Loop(*span, count(body)) for span, body in bodies.items()]
