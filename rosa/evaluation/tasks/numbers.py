"""The last number of a text, in the ways that people and models write numbers. Time is linear in the text's length."""

from __future__ import annotations

import math
import re

_MINUS = "[-\u2212\u2013]"
_CURRENCY = r"\\?[$€£¥₹]"
_SPACE = "[ \u00a0\u2009\u202f]"
# Groups of digits: 1,234,567, India's 12,34,567, and 1 234 567; but "5 200-page books" are 5 of 200 pages.
_SPACED = rf"{_SPACE}(?![1-9]\d\d[-\u2010\u2011]\w)\d{{3}}"
_GROUPED = rf"\d{{1,3}}(?:(?:,\d{{3}})+|(?:,\d\d){{1,4}},\d{{3}}|(?:{_SPACED})+)(?!\d)"
_DIGITS = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
_EXPONENT = r"[-+\u2212]?\d+"
_NUMBER = re.compile(
    rf"(?:(?P<whole>\d+){_SPACE})?(?<!/)(?P<top>{_DIGITS})/(?P<bottom>{_DIGITS})(?![/\d])"
    rf"|(?:(?P<factor>{_DIGITS})\s?(?:[x\xd7*·]|\\times|\\cdot)\s?(?=10[\^*]))?(?P<base>{_DIGITS})(?:\^|\*\*)"
    rf"[{{(]?(?P<power>{_EXPONENT})"
    rf"|\^[{{(]?{_EXPONENT}"  # the exponent of a unit or of a variable: no number of its own
    rf"|(?P<digits>{_DIGITS})(?:[eE](?P<exponent>{_EXPONENT})(?!\w)|:00(?![:\d]))?"
)
_LATEX_FRACTION = re.compile(rf"\\[dt]?frac\{{({_MINUS}?{_DIGITS})\}}\{{({_DIGITS})\}}")
# A minus is a sign, unless it stands behind what it could be subtracted from: 7-3, 7 -3, 10%-20%, (2+5)-3. Before a
# space it is one only where a number has to follow: the text's beginning, "= - 3", "is - 3".
_SIGN = re.compile(
    rf"(?:(?<![\w)\]}}%])(?<![\d)\]}}%]\s){_MINUS}"
    rf"|(?:\A\s*|[=:≈(\[{{$] ?|\b(?:is|are|was|be|equals|to|of) ){_MINUS} )(?:{_CURRENCY}\s?)?\Z"
)
_SIGN_WITHIN = 16  # characters before a number
_ALONE = re.compile(rf"(?:{_MINUS} ?(?:{_CURRENCY} ?)?|(?:{_CURRENCY} ?)?{_MINUS}?)(?:{_NUMBER.pattern})")


def last_number(text: str) -> float | None:
    """The value of the last number in a text, by the rules of `rosa.evaluation.tasks.extract_answer`; None if there is
    none, or if it has no finite value.
    """
    text = _plain(text)
    last = None
    for found in _NUMBER.finditer(text):
        if found["bottom"] or found["power"] or found["digits"]:
            last = found
    if last is None:
        return None
    value = _value(last)
    if not math.isfinite(value):  # a model caught in a loop writes more digits than a float holds
        return None
    return -value if _SIGN.search(text, max(0, last.start() - _SIGN_WITHIN), last.start()) else value


def only_number(text: str) -> float | None:
    """The value of a text that is one number and nothing else; None if it is anything else."""
    return last_number(text) if _ALONE.fullmatch(_plain(text)) else None


def _plain(text: str) -> str:
    r"""Without LaTeX: 1{,}000 is 1,000, 1\,000 is 1 000, 2\frac{1}{2} is 2 1/2."""
    text = text.replace("{,}", ",").replace(r"\,", " ").replace(r"\!", "")
    return _LATEX_FRACTION.sub(r"\1/\2", re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text))


def _value(found: re.Match) -> float:
    if found["power"]:
        return _float(found["factor"] or "1") * _power(_float(found["base"]), found["power"])
    if found["digits"]:
        return _float(found["digits"], found["exponent"] or "0")
    top, bottom = _float(found["top"]), _float(found["bottom"])
    if bottom == 0:
        return math.nan
    return top / bottom + (_float(found["whole"]) if found["whole"] and top < bottom else 0)


def _power(base: float, exponent: str) -> float:
    try:
        return base ** float(exponent.replace("\u2212", "-"))
    except (OverflowError, ZeroDivisionError):
        return math.nan


def _float(digits: str, exponent: str = "0") -> float:
    return float(re.sub(r"[^\d.]", "", digits) + "e" + exponent.replace("\u2212", "-"))
