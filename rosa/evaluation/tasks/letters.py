"""The letter, A to E, that a text gives as its answer. Every repetition is bounded: a model caught in a loop writes the
same words or brackets by the thousand, and time has to stay linear in the text's length."""

from __future__ import annotations

import re
from typing import NamedTuple

# Neither part of a word, of an abbreviation (e.g.) or of a formula (B's, D/(M-3), A + B), nor the article (A man), nor
# asked for (is it B?).
_REASONS = "because|since|as|with|which|for|but|and|or|nor|not|is|are"
_OPEN, _CLOSE = r"""[(\["'\u201c\u2018\s]{0,6}""", r"""[)\]"'\u201d\u2019]{0,6}"""
_NO_FORMULA = r"""(?!\w|['\u2019]\w|\.[a-z]\b|\.[A-Z]\.|[-+/^=<>\xd7\xf7(]|\s[+/^=<>\xd7\xf7]|[)\]]{0,6}\s?\?)"""
_UPPER = rf"(?<!\w)[A-E]{_NO_FORMULA}(?!(?<=A)\s{{1,3}}(?!(?:{_REASONS})\b)[a-z])"
# "a" and "e" in small letters are words and numbers too: something has to set the letter off.
_LOWER = rf"(?<!\w)[a-e]{_NO_FORMULA}(?=\s{{0,3}}(?:\Z|[.,;:!)\]\n]|(?:{_REASONS})\b))"
_LETTER = rf"{_OPEN}(?:{_UPPER}|{_LOWER}){_CLOSE}"
_FILLER = (
    r"(?:(?:be|choose|pick|select|the|an?|both|either|option|options|choice|choices|answer|answers|letter)\b"
    r" {0,3}){0,4}"
)
# The space behind belongs to the letter: one that could belong to either would be tried both ways for each letter.
_AND = r"\s{0,3}(?:,(?:\s{0,3}(?:and|or|nor))?|&|and|or|nor)(?:\s{1,3}(?:option|choice|letter))?(?=\s)"
_LETTERS = rf"{_LETTER}(?:{_AND}{_LETTER}){{0,4}}"
_OR = rf"{_CLOSE}(?:,{_LETTER}){{0,4}},?\s{{0,3}}(?i:\bor\b(?:\s(?:option|choice|letter)\b)?){_LETTER}"

# On one line. "I do not think that the answer is B" denies; "if the answer is B" says nothing, and "since it is B"
# gives a reason.
_BEFORE = (
    r"(?:\b(?:(?P<open>if|whether|unless|suppose|assume|assuming"
    r"|(?:since|as)(?= (?:it|that)(?:['\u2019]s| is)\b))"
    r"|(?P<denied>(?:not|never|\w{1,9}n['\u2019]t) (?:think|believe|say|true|correct|the case)|doubt))"
    r" (?:that )?(?:the |my )?)?"
)
_SAID = (
    r"(?:\b(?P<wrong>incorrect |wrong )?answer\b|\b(?:correct|right|best) (?:option|choice|letter|one)\b"
    r"|\b(?:it|that)(?:['\u2019]s| (?:is|must be|has to be))\b|\bleav(?:es|ing)\b"
    r"|\bI(?:['\u2019](?:d|ll)|\s(?:would|will|must|have\sto))?\s(?:choose|pick|select|go\swith)\b"
    r"|\b(?:actually|no|sorry)(?=[,:]))"
)
_BETWEEN = (
    r"(?:[\s:=,>\u2192\u21d2]|[-\u2013\u2014](?=[\s>])"
    r"|(?:is|are|be|was|would|should|must|will|has|only|therefore|thus|hence|then|the|this|correct|right|best"
    r"|to\s(?:this|the)\s(?:question|problem)|most|likely|probably|clearly|obviously|definitely|certainly|simply|just"
    r"|indeed|actually|in\sfact|here|given|by|option|choice|answer|letter|it|us)\b){0,30}"
)
_STATED = re.compile(
    rf"(?i:{_BEFORE}{_SAID}{_BETWEEN})(?P<letter>{_LETTER})(?!{_OR})"  # either is none
)
_JUDGED = re.compile(
    rf"(?P<letters>{_LETTERS})\s{{0,3}}"
    r"(?i:(?P<verb>(?:(?:(?P<singular>is|was|does|has)|are|were|must|would|can|could|should|do|have)"
    r"(?:\s?not|n['\u2019]t)?|cannot)\b"
    r"(?:\s(?:be|been|the|an?|only|one|most|likely|probably|also|clearly|definitely|therefore|thus|not|never)\b){0,4})"
    r"\s(?P<judgement>(?:correct|right|true|answer|best|incorrect|wrong|false|invalid|impossible|out|eliminated|excluded"
    r"|rejected|ruled\sout|fit|work|match|satisfy)\b))"
)
_DENIED = re.compile(
    r"(?i:\b(?:not|never|cannot|neither|nor|none of|rather than|instead of|\w{1,9}n['\u2019]t"
    rf"|rul(?:e|es|ed|ing) out|(?:eliminat|exclud|reject|discard)\w{{1,3}})\b[ (]{{1,3}}{_FILLER})"
    rf"(?P<letters>{_LETTERS})(?P<but>(?i: {{0,3}},? {{0,3}}but (?:rather |instead )?{_FILLER}){_LETTER})?"
)
_NEGATIVE = re.compile(
    r"not\b|n['\u2019]t\b|\b(?:never|cannot|nor|incorrect|wrong|false|invalid|impossible|out|eliminated|excluded"
    r"|rejected)\b",
    re.IGNORECASE,
)
_EXCEPTED = re.compile(r"(?i:\b(?:except|other\sthan|besides|apart\sfrom|none\sof)(?:\s(?:for|option)){0,2})\s?\Z")

_END = re.compile(
    rf"(?:(?P<list>[)\]]{_AND}\s{{1,6}}|\bbetween\s)?[(\[](?P<set>[A-E])[)\]]"
    r"|(?:\A|\n|(?i:\b(?:so|therefore|thus|hence|choose|select|pick)\b))[\s,:]{0,6}(?P<alone>[A-E]))\Z"
)
_END_WITHIN = 60  # characters
_BEGINNING = re.compile(r"[(\[]?([A-E])(?:[)\]]|[.:]?\s{0,6}(?:\n|\Z)|[.:]\s)")
_MENTIONED = re.compile(rf"(?<!\w)\(([A-E])\)(?!\s?\?)|(?i:\b(?:option|choice)\s{{1,3}})({_LETTER})")


class _Claim(NamedTuple):
    """That a letter is the answer, or that it is not."""

    place: int
    letter: str
    holds: bool


def stated_letter(text: str) -> str | None:
    """The letter that a text gives as its answer, by the rules of `rosa.evaluation.tasks.extract_answer`."""
    text = _plain(text)
    last: dict[str, _Claim] = {claim.letter: claim for claim in sorted(_claims(text))}
    stated = [claim for claim in last.values() if claim.holds]
    if stated:
        return max(stated).letter
    for letter in (_at_the_end(text), _at_the_beginning(text), _only_one(text, without=last)):
        if letter is not None and letter not in last:
            return letter
    return None


def _claims(text: str) -> list[_Claim]:
    claims = []
    for found in _STATED.finditer(text):
        if not found["open"]:
            holds = not found["denied"] and not found["wrong"]
            claims.append(_Claim(found.end(), _letters(found["letter"])[0], holds))
    for found in _JUDGED.finditer(text):
        letters, holds = _letters(found["letters"]), _holds(found)
        # "The answer is D and B is wrong" judges B alone.
        if found["singular"] and not re.search(r"\bn?or\b", found["letters"]):
            letters = letters[-1:]
        if not holds or len(letters) == 1:
            claims += [_Claim(found.end(), letter, holds) for letter in letters]
    for found in _DENIED.finditer(text):
        claims += [_Claim(found.end("letters"), letter, False) for letter in _letters(found["letters"])]
        if found["but"]:
            claims.append(_Claim(found.end(), _letters(found["but"])[-1], True))
    return claims


def _holds(judged: re.Match) -> bool:
    """Two negatives make a positive: "B is not incorrect", "all except B are wrong"."""
    negatives = len(_NEGATIVE.findall(f"{judged['verb']} {judged['judgement']}"))
    negatives += bool(re.search(r"\bnor\b", judged["letters"]))
    negatives += bool(_EXCEPTED.search(judged.string, max(0, judged.start() - 24), judged.start()))
    return negatives % 2 == 0


def _letters(text: str) -> list[str]:
    return [letter.upper() for letter in re.findall(r"(?<!\w)[A-Ea-e](?!\w)", text)]


def _at_the_end(text: str) -> str | None:
    end = text.rstrip(" \t\n.!")
    found = _END.search(end, max(0, len(end) - _END_WITHIN))
    return (found["set"] or found["alone"]) if found and not found["list"] else None


def _at_the_beginning(text: str) -> str | None:
    found = _BEGINNING.match(text)
    listed = re.match(r"[(\[]?A([)\].:]).{1,200}?\bB\1.{1,200}?\bC\1", text, re.DOTALL)
    return found[1] if found and not listed else None


def _only_one(text: str, without: dict) -> str | None:
    mentioned = {one or _letters(other)[0] for one, other in _MENTIONED.findall(text)} - set(without)
    return mentioned.pop() if len(mentioned) == 1 else None


def _plain(text: str) -> str:
    r"""Without LLM-Adapters' "A: " and the dress of Markdown and LaTeX: \boxed{\text{C}} is ((C)), (d) is (D)."""
    text = re.sub(r"\\(?:boxed|text\w*|math\w+)|[*_$`#]", "", text).translate({ord("{"): "(", ord("}"): ")"}).strip()
    text = text[2:].strip() if re.match(r"A:\s", text) else text
    return re.sub(r"(?<!\w)\([a-e]\)|\A[a-e]\Z", lambda found: found.group().upper(), text)
