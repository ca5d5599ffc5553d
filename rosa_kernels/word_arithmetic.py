"""The arithmetic of whole numbers in NVIDIA's machine code, on words of 32 bits.

Each operation takes an instruction's modifiers, its sources (numbers from 0 to 2^32, or int64 tensors of them), the
second words of these where they are of 64 bits, and the truths that it reads; it returns the words and the truths that
it sets. What it is not told here stays unknown: that is safe, a wrong number is not.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor

WORD = (1 << 32) - 1
_COMPARISONS = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def _signed(x):
    return ((x & WORD) ^ (1 << 31)) - (1 << 31)


def _pair(low, high):
    return (low & WORD) | (high & WORD) << 32


def _add(modifiers, x, high, carries):
    if "64" in modifiers:
        total = sum(_pair(*words) for words in zip(x, high, strict=True))
        return [total & WORD, total >> 32 & WORD], []
    total = sum(x) + (sum(carries) if "X" in modifiers else 0)
    return [total & WORD], [total >> 32 == 1, total >> 32 == 2]


def _multiply_add(modifiers, x, high, carries):
    a, b, c = x
    if modifiers & {"WIDE", "HI"}:
        if "U32" not in modifiers:
            a, b = _signed(a), _signed(b)
        total = a * b + _pair(c, high[2])
        return [total & WORD, total >> 32 & WORD] if "WIDE" in modifiers else [total >> 32 & WORD], []
    return [(a * b + c + (sum(carries) if "X" in modifiers else 0)) & WORD], []


def _logic(modifiers, x, high, conditions):
    a, b, c, table = x
    return [word := _lookup(a, b, c, table) & WORD], [word != 0]


def _lookup(a, b, c, table):
    terms = (
        (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c) for n in range(8) if int(table) >> n & 1
    )
    return reduce(or_, terms, 0)


def _logic_of_predicates(modifiers, x, high, conditions):
    a, b, c = conditions[:3]
    return [], [_lookup(a, b, c, table) & 1 for table in x[:2]]


def _compare(modifiers, x, high, conditions):
    (a, b), condition = x, conditions[0]
    if modifiers & {"U64", "S64"}:
        a, b = (_pair(*words) for words in zip(x, high, strict=True))
    elif "U32" not in modifiers:
        a, b = _signed(a), _signed(b)
    else:
        a, b = a & WORD, b & WORD
    name = next(m for m in _COMPARISONS if m in modifiers)
    truth = _COMPARISONS[name](a, b)
    if "EX" in modifiers:  # of the higher words: the last condition is what their lower words gave
        lower = conditions[1]
        truth = (truth | (lower > 0)) if name == "NE" else ((a == b) & (lower > 0)) | ((a != b) & truth)
    other = ~truth if isinstance(truth, Tensor) else not truth
    join = (lambda t: t & (condition > 0)) if "AND" in modifiers else (lambda t: t | (condition > 0))
    return [], [join(truth), join(other)]


def _shift(modifiers, x, high, conditions):
    """Of the two words `first` and `last`, the lower one first."""
    first, by, last = x
    if "L" in modifiers:
        return [_pair(first, last) << by >> 32 & WORD if "HI" in modifiers else first << by & WORD], []
    if "HI" in modifiers:
        return [(_signed(last) if "S32" in modifiers else last) >> by & WORD], []
    return [_pair(first, last) >> by & WORD], []


def _shift_add(modifiers, x, high, conditions):
    *x, by = x
    if "HI" not in modifiers:
        total = (x[0] << by & WORD) + x[1]
        return [total & WORD], [total >> 32 == 1]
    upper = _signed(x[0]) >> 31 if "SX32" in modifiers else x[2]
    total = (_pair(x[0], upper) << by >> 32 & WORD) + x[1] + (sum(conditions) if "X" in modifiers else 0)
    return [total & WORD], []


def _choose(modifiers, x, high, conditions):
    return [_where(conditions[0], x[0], x[1])], []


def _where(condition, a, b):
    if isinstance(condition, Tensor):
        return torch.where(condition > 0, a, b)
    return a if condition else b


def _minimum(modifiers, x, high, conditions):
    """Of the last two sources, with the first added to the second of three; the maximum where the predicate says so."""
    *added, b = [v & WORD if "U32" in modifiers else _signed(v) for v in x]
    a = sum(added)
    least = _where(conditions[-1], _where(a < b, a, b), _where(a < b, b, a))
    return [least & WORD], []


def _extend(modifiers, x, high, conditions):
    a, bits = x
    a = a & ((1 << bits) - 1)
    return [a if "U32" in modifiers else ((a ^ (1 << bits - 1)) - (1 << bits - 1)) & WORD], []


def _gather(modifiers, x, high, conditions):
    """The predicates of a mask as bits of a word, its other bits kept."""
    word, mask = x
    return [word & (WORD ^ mask) | sum(condition << n for n, condition in enumerate(conditions))], []


def _absolute(modifiers, x, high, conditions):
    return [abs(_signed(x[0]))], []


def _bits(x):
    """Words as the float32 that they are the bits of."""
    return _signed(torch.as_tensor(x)).to(torch.int32).view(torch.float32)


def _words(x):
    """The bits of float32 as words."""
    return x.float().view(torch.int32).long() & WORD


# A division by what is known at the launch alone begins with a reciprocal in float32, which is made exact later on.


def _to_float(modifiers, x, high, conditions):
    exact = torch.as_tensor(x[0] if "U32" in modifiers else _signed(x[0])).double()
    rounded = exact.float()
    if "RP" in modifiers:
        above = torch.nextafter(rounded, torch.tensor(torch.inf))
        rounded = torch.where(rounded.double() < exact, above, rounded)
    return [_words(rounded)], []


def _reciprocal(modifiers, x, high, conditions):
    return [_words(1 / _bits(x[0]))], []


def _to_word(modifiers, x, high, conditions):
    return [_bits(x[0]).double().nan_to_num().clamp(0, WORD).long()], []


def _bits_set(modifiers, x, high, conditions):
    return [sum(x[0] >> n & 1 for n in range(32))], []


def _leading_one(modifiers, x, high, conditions):
    return [sum(x[0] >> n > 0 for n in range(32)) - 1 & WORD], []


OPERATIONS = {
    "IADD3": _add, "IADD": _add, "VIADD": _add, "IMAD": _multiply_add, "LOP3": _logic, "PLOP3": _logic_of_predicates,
    "ISETP": _compare, "SHF": _shift, "LEA": _shift_add, "SEL": _choose, "IMNMX": _minimum, "VIMNMX": _minimum,
    "VIADDMNMX": _minimum, "SGXT": _extend, "IABS": _absolute, "I2F": _to_float, "MUFU.RCP": _reciprocal,
    "POPC": _bits_set, "FLO": _leading_one,
    "P2R": _gather, "F2I.FTZ.U32.TRUNC.NTZ": _to_word,
}  # fmt: skip
