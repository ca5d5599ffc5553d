"""Reading the answer out of what a model wrote, and judging it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from rosa.tasks.benchmarks import TASKS
from rosa.tasks.task import Task

TOLERANCE = 1e-3

# A minus is a sign, unless it stands right behind what it could be subtracted from: 7-3, 10%-20%, (2+5)-3.
_SIGN = r"(?<![\w)\]%])[-\u2212]"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+"
_NUMBER = re.compile(rf"({_SIGN})?(?:[$€£¥₹]\s?)?({_SIGN})?({_DIGITS})")

# An option's letter: neither part of a word or a formula (B's, D/(M-3), A + B), nor the article (A man).
_LETTER = r"""[(\["'\s]*(?<!\w)([A-E])(?!\w|['\u2019]\w|[-+/^=<>\xd7\xf7(]|\s[+/^=<>\xd7\xf7])"""
_REASONS = "because|since|as|with|which|for"
_NO_ARTICLE = rf"(?!(?<=A)\s+(?!(?:{_REASONS})\b)[a-z])"
# Bounded: a model caught in a loop writes such words by the hundred.
_BETWEEN = (
    r"(?i:[\s:=,>]|\b(?:is|are|be|was|would|should|must|will|therefore|thus|hence|then|the|to|this|question|correct|right"
    r"|best|most|likely|probably|given|by|option|choice|answer|letter)\b){0,60}"
)
_STATED = re.compile(
    rf"(?i:\banswer\b|\b(?:correct|right|best)\s+(?:option|choice|letter|one)\b){_BETWEEN}{_LETTER}{_NO_ARTICLE}"
)
_CONFIRMED = re.compile(rf"{_LETTER}[)\]\s]*(?i:(?:is|must be|would be)\s+(?:the\s+)?(?:correct|right|answer|best)\b)")
_LAST = re.compile(
    r"(?:[(\[]([A-E])[)\]]|(?:^|\n|(?i:\b(?:so|therefore|thus|hence|choose|select|pick)\b)[\s,:]*)([A-E]))[\s.!)\]]*$"
)
_FIRST = re.compile(r"[(\[]?([A-E])(?:[)\]]|[.:]?\s*(?:\n|$)|[.:]\s)")
_MENTIONED = re.compile(rf"(?<!\w)\(([A-E])\)|(?i:\b(?:option|choice)\s+){_LETTER}")


def extract_answer(task: str | Task, text: str) -> str | float | None:
    """Read the answer to a task out of a model's text.

    - Options: the first that occurs, in upper or lower case, as a word of its own (answer1 is not in answer10); where
      two begin at the same place, the longer one.
    - "number": the last number. Thousands separators (1,234), a currency sign, a sign and decimals belong to it, a full
      stop behind it does not.
    - "letter": A to E where the text gives it as the answer, and no other capital letter. In this order: the last
      letter that is called the answer ("The answer is (D).", "Answer: C", "the correct option is B", "(E) is correct");
      a letter that ends the text, in brackets, on a line of its own or after "therefore"; a letter set off at its
      beginning ("D", "(B) 12", "C) 62 m"), where LLM-Adapters' "A: ", with which every answer begins, does not count;
      the only letter that is mentioned as an option ("option D", "(D)").
    - "text": the text, without a final full stop, with single spaces.

    The rules for options and numbers are those of LLM-Adapters (Hu et al. 2023), which the paper follows; its rule for
    AQuA, the first capital letter from A to E, takes the article of "A man" for an answer.

    Args:
        task (str or Task): one of the fifteen benchmarks by name, or any task.
        text (str): what the model wrote after the prompt.

    Returns:
        str, float or None: the option as the task spells it, the number, the letter or the text; None if there is none.

    Raises:
        ValueError: there is no benchmark of this name.
    """
    return _reader(_task(task))(text)


def is_correct(task: str | Task, text: str, answer: str) -> bool:
    """Whether the answer in a model's text is the true one.

    Args:
        task (str or Task): one of the fifteen benchmarks by name, or any task.
        text (str): what the model wrote after the prompt.
        answer (str): the truth, in the task's form.

    Returns:
        bool: equal; numbers within 1e-3, texts whatever the case.

    Raises:
        ValueError: there is no benchmark of this name, or the truth is not in the task's form.
    """
    given, truth = extract_answer(task, text), read_truth(task, answer)
    if given is None:
        return False
    if isinstance(truth, float):
        return abs(given - truth) <= TOLERANCE
    return given.casefold() == truth.casefold()


def read_truth(task: str | Task, answer: str) -> str | float:
    """The true answer of a row, which must be in the task's form and nothing else.

    Args:
        task (str or Task): one of the fifteen benchmarks by name, or any task.
        answer (str): the row's `answer`.

    Returns:
        str or float: as `extract_answer` gives it.

    Raises:
        ValueError: it is in another form.
    """
    form = _task(task).answer
    text = " ".join(answer.split())
    if isinstance(form, tuple):
        if text.casefold() in (option.casefold() for option in form):
            return _option(text, form)
        expected = f"one of {', '.join(form)}"
    elif form == "number":
        value = _number(text) if _NUMBER.fullmatch(text) else None
        if value is not None:
            return value
        expected = "a number such as 1,234.5"
    elif form == "letter":
        if re.fullmatch("[A-E]", text):
            return text
        expected = "a letter from A to E"
    else:
        if _text(answer):
            return _text(answer)
        expected = "a text"
    raise ValueError(f"`answer` must be {expected}, got {answer!r}")


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"there is no benchmark {task!r}: it must be one of {', '.join(TASKS)}")
    return TASKS[task]


def _reader(task: Task) -> Callable[[str], str | float | None]:
    if isinstance(task.answer, tuple):
        return lambda text: _option(text, task.answer)
    return {"number": _number, "letter": _letter, "text": _text}[task.answer]


def _option(text: str, options: tuple[str, ...]) -> str | None:
    longest_first = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    found = re.search(rf"(?<!\w)(?:{longest_first})(?!\w)", text, re.IGNORECASE)
    return found and next(option for option in options if option.casefold() == found.group().casefold())


def _number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, sign_behind_currency, digits = found[-1]
    value = float(digits.replace(",", ""))
    if math.isinf(value):  # a model caught in a loop writes more digits than a float holds
        return None
    return -value if sign or sign_behind_currency else value


def _letter(text: str) -> str | None:
    text = _plain(text)
    stated = sorted((*_STATED.finditer(text), *_CONFIRMED.finditer(text)), key=lambda found: found.end())
    found = stated[-1] if stated else _LAST.search(text) or _FIRST.match(text)
    if found:
        return next(filter(None, found.groups()))
    mentioned = {one or other for one, other in _MENTIONED.findall(text)}
    return mentioned.pop() if len(mentioned) == 1 else None


def _plain(text: str) -> str:
    r"""Without LLM-Adapters' "A: " and the dress of Markdown and LaTeX: \boxed{\text{C}} is ((C)), (d) is (D)."""
    text = re.sub(r"\\(?:boxed|text\w*|math\w+)|[*_$`]", "", text).translate({ord("{"): "(", ord("}"): ")"})
    text = re.sub(r"\A\s*A:\s", "", text).strip()
    return re.sub(r"(?<!\w)\([a-e]\)|\A[a-e]\Z", lambda found: found.group().upper(), text)


def _text(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip()
