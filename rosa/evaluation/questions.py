"""Rows that wait for an answer: instructions, texts to continue or conversations, each asked in its adapter's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.data.files import Source, read_rows, read_text
from rosa.data.forms import ASSISTANT, check_instruction, conversation, turns_of
from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN
from rosa.data.prompts import chat_ids, question_ids
from rosa.evaluation.generation import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_questions(data: str, form: str | None = None) -> list[dict[str, Any]]:
    """Reads rows that wait for an answer, and checks every one.

    Args:
        data (str): what `rosa.data.files.Source` takes, with rows that have `instruction` and perhaps `input`; or turns
            in one of the forms that `rosa train` takes, up to the user's last: an answer after that is asked for again;
            or `prompt`, a text to continue. Or a .txt file with a question a line.
        form (str, optional): of the prompts of the adapter that lines are for; None for a bare model.

    Returns:
        list of dict: the rows as they came, those with an instruction with `input` set to "" where it was absent. A
        line is an instruction, or a text to continue where the form is PLAIN or there is none.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: there are no rows, or one is not in this form; the message names the place.
    """
    if Path(data).suffix == ".txt":
        lines = read_text(Path(data)).split("\n")
        lines = [line.rstrip("\r") for line in lines if line.strip()]
        if form in (PLAIN, None):
            return [{"prompt": line} for line in lines]
        return [{"instruction": line, "input": ""} for line in lines]
    rows = [_checked(row, place) for place, row in read_rows(Source(data))]
    if not rows:
        raise ValueError(f"{data} holds no rows")
    return rows


def check_form(row: Mapping[str, Any], form: str | None, place: str) -> None:
    """Raises ValueError where a row is a conversation that an adapter of this form cannot be asked."""
    turns = len(_asked(row, place)) if _has_turns(row) else 0
    if turns > 1 and form not in (CHAT, None):
        raise ValueError(
            f"{place}: there are {turns} turns up to the user's last, and the adapter, whose prompts are of the form "
            f"{form!r}, is asked one question at a time: give the user's turn alone"
        )


def is_verbatim(row: Mapping[str, Any]) -> bool:
    """Whether a row of `load_questions` is a text to continue as it is."""
    return "instruction" not in row and not _has_turns(row)


def form_of(row: Mapping[str, Any], form: str | None) -> str:
    """How a row is asked, of the adapter's form or of the bare model: an instruction in the paper's prompt then, and a
    conversation by the chat template."""
    return form or (INSTRUCTION if "instruction" in row else PLAIN if is_verbatim(row) else CHAT)


def question(row: Mapping[str, Any], form: str | None, tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
    """What the model is to continue.

    Args:
        row (mapping): one of `load_questions`.
        form (str or None): of the adapter's prompts; None for a bare model.
        tokenizer (PreTrainedTokenizerBase): the model's.

    Returns:
        str or list of int: a `prompt` verbatim, of all else the token ids.

    Raises:
        ValueError: it is a matter for the chat template, and there is none, or it refuses the turns.
    """
    if is_verbatim(row):
        return row["prompt"]
    form = form_of(row, form)
    if "instruction" in row:
        return question_ids(form, tokenizer, row["instruction"], row["input"])
    turns = _asked(row)
    return chat_ids(turns, tokenizer) if form == CHAT else question_ids(form, tokenizer, turns[-1]["content"])


def _checked(row: object, place: str) -> dict[str, Any]:
    if not isinstance(row, dict) or "instruction" in row or not (_has_turns(row) or "prompt" in row):
        return check_instruction(row, place, None)
    if _has_turns(row):
        _asked(row, place)
    else:
        _check_prompt(row["prompt"], place)
    return row


def _has_turns(row: Mapping[str, Any]) -> bool:
    return "instruction" not in row and (_has_conversation(row) or isinstance(row.get("prompt"), list))


def _has_conversation(row: Mapping[str, Any]) -> bool:
    return not {"messages", "conversations"}.isdisjoint(row)


def _asked(row: Mapping[str, Any], place: str = "") -> list[dict[str, str]]:
    """The turns of a row up to the user's last: an answer to it is left out."""
    turns = conversation(row, place) if _has_conversation(row) else turns_of(row, "prompt", place)
    while turns and turns[-1]["role"] == ASSISTANT:
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        last = f"it is the {turns[-1]['role']}'s" if turns else "there is none"
        raise ValueError(f"{place}: the last turn before an answer must be the user's, and {last}")
    return turns


def _check_prompt(value: object, place: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place}: `prompt` must be a text, got {value!r}")
    try:
        check_text(value)
    except ValueError as error:
        raise ValueError(f"{place}: `prompt`: {error}") from error
