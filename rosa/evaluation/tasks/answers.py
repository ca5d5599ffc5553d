"""Reading the answer out of what a model wrote, and judging it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from rosa.evaluation.tasks.benchmarks import TASKS
from rosa.evaluation.tasks.letters import stated_letter
from rosa.evaluation.tasks.numbers import last_number, only_number
from rosa.evaluation.tasks.task import Task
from rosa.storage.digest import digest

# The paper's, and absolute: 0 passes for a truth of 0.0005. The smallest of the fifteen benchmarks, 0 apart, is 0.08.
TOLERANCE = 1e-3


def extract_answer(task: str | Task, text: str) -> str | float | None:
    r"""Read the answer to a task out of a model's text.

    - Options: the first that occurs, in upper or lower case, as a word of its own (answer1 is not in answer10); where
      two begin at the same place, the longer one.
    - "number": the last number. Part of it are thousands separators (1,234, 1{,}234, 1 234), a currency sign, a minus
      that is no subtraction, decimals, exponents (1.5e3, 2 x 10^3), the fraction 3/4 or \frac{3}{4} (not 3 / 4, where 4
      is the last number), also mixed (2 3/4), and a full hour's minutes (3:00). A power of a number is its value (2^10
      is 1024). The exponent of cm^2 is none, and a full stop behind a number is no part of it; nor are the 200 of "5
      200-page books" thousands.
    - "letter": A to E where the text gives it as the answer. In this order: the letter that is called the answer last
      ("The answer is (D).", "Answer: C", "the correct option is B", "(E) is correct", "I would choose C", "not A but
      B"; not "if the answer is B", "since it is B", "A, B or C") and not denied after that; and where none is, of those
      that are never denied ("not (C)", "B is wrong", "rules out A"): a letter that ends the text, in brackets, on a
      line of its own or after "therefore"; a letter set off at its beginning ("D", "(B) 12", "C) 62 m"), where
      LLM-Adapters' "A: ", with which every answer begins, does not count; the only letter that is mentioned as an
      option ("option D", "(D)").
    - "text": the text, without a final full stop, with single spaces.

    The first option and the last number are the rules of LLM-Adapters (Hu et al. 2023), which the paper follows, though
    they take 3/4 for 4, 2^10 for 10 and 1e3 for 3; its rule for AQuA, the first capital letter from A to E, takes the
    article of "A man" for an answer.

    Args:
        task (str or Task): one of the fifteen benchmarks by name, or any task.
        text (str): what the model wrote after the prompt.

    Returns:
        str, float or None: the option as the task spells it, the number, the letter or the text; None if there is none.

    Raises:
        ValueError: there is no benchmark of this name.
    """
    form = _task(task).answer
    if isinstance(form, tuple):
        return _first_option(text, form)
    return {"number": last_number, "letter": stated_letter, "text": _text}[form](text)


def is_correct(task: str | Task, text: str, answer: str) -> bool:
    """Whether the answer in a model's text is the true one.

    Args:
        task (str or Task): one of the fifteen benchmarks by name, or any task.
        text (str): what the model wrote after the prompt.
        answer (str): the truth, in the task's form.

    Returns:
        bool: equal; numbers within TOLERANCE, texts whatever the case.

    Raises:
        ValueError: there is no benchmark of this name, or the truth is not in the task's form.
    """
    given, truth = extract_answer(task, text), read_truth(task, answer)
    if given is None:
        return False
    if isinstance(truth, float):
        return abs(given - truth) <= TOLERANCE
    return given.casefold() == truth.casefold()


@functools.cache
def rules_digest() -> str:
    """A digest of the rules by which answers are read and judged: of the text of the code that has them."""
    files = [Path(__file__).with_name(name) for name in ("answers.py", "letters.py", "numbers.py")]
    return digest([file.read_text(encoding="utf-8") for file in files])


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
        found = next((option for option in form if " ".join(option.split()).casefold() == text.casefold()), None)
        expected = f"one of {', '.join(form)}"
    elif form == "number":
        found, expected = only_number(text), "a number such as 1,234.5"
    elif form == "letter":
        found, expected = text if re.fullmatch("[A-E]", text) else None, "a letter from A to E"
    else:
        found, expected = _text(answer) or None, "a text"
    if found is None:
        raise ValueError(f"`answer` must be {expected}, got {answer!r}")
    return found


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"there is no benchmark {task!r}: it must be one of {', '.join(TASKS)}")
    return TASKS[task]


def _first_option(text: str, options: tuple[str, ...]) -> str | None:
    longest_first = sorted(options, key=len, reverse=True)
    found = re.search(rf"(?<!\w)(?:{'|'.join(f'({re.escape(option)})' for option in longest_first)})(?!\w)", text, re.I)
    return longest_first[found.lastindex - 1] if found else None


def _text(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip()
