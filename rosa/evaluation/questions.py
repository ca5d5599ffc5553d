"""Rows that wait for an answer: instructions, texts to continue or conversations, each asked in its adapter's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.data.files import Source, read_rows, read_text
from rosa.data.forms import check_instruction
from rosa.data.prompt_form import CHAT, INSTRUCTION
from rosa.data.prompts import chat_ids, question_ids
from rosa.evaluation.generation import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_questions(data: str) -> list[dict[str, Any]]:
    """Reads rows that wait for an answer, and checks every one.

    Args:
        data (str): a .json or .jsonl file or the name of a dataset, whose rows have `instruction` and perhaps `input`,
            or `prompt`, a text to continue, or `messages`, turns with `role` and `content` of which the user has the
            last; or a .txt file with a prompt a line.

    Returns:
        list of dict: the rows as they came, those with an instruction with `input` set to "" where it was absent.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: there are no rows, or one is not in this form; the message names the place.
    """
    if Path(data).suffix == ".txt":
        lines = read_text(Path(data)).split("\n")
        return [{"prompt": line.rstrip("\r")} for line in lines if line.strip()]
    rows = [_checked(row, place) for place, row in read_rows(Source(data))]
    if not rows:
        raise ValueError(f"{data} holds no rows")
    return rows


def check_form(row: Mapping[str, Any], form: str | None, place: str) -> None:
    """Raises ValueError where a row is a conversation that an adapter of this form cannot be asked."""
    turns = len(row.get("messages", ()))
    if turns > 1 and form not in (CHAT, None):
        raise ValueError(
            f"{place}: `messages` has {turns} turns, and the adapter, whose prompts are of the form {form!r}, is asked "
            "one question at a time: give the user's turn alone"
        )


def question(row: Mapping[str, Any], form: str | None, tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
    """What the model is to continue.

    Args:
        row (mapping): one of `load_questions`.
        form (str or None): of the adapter's prompts; None for a bare model, which is asked an instruction in the
            paper's prompt, and a conversation by its chat template.
        tokenizer (PreTrainedTokenizerBase): the model's.

    Returns:
        str or list of int: a `prompt` verbatim, of all else the token ids.

    Raises:
        ValueError: it is a matter for the chat template, and there is none, or it refuses the turns.
    """
    if "instruction" in row:
        return question_ids(form or INSTRUCTION, tokenizer, row["instruction"], row["input"])
    if "prompt" in row:
        return row["prompt"]
    if form in (CHAT, None):
        return chat_ids(row["messages"], tokenizer)
    return question_ids(form, tokenizer, row["messages"][-1]["content"])


def _checked(row: object, place: str) -> dict[str, Any]:
    if not isinstance(row, dict) or "instruction" in row or not {"prompt", "messages"} & row.keys():
        return check_instruction(row, place, None)
    if "prompt" in row:
        _check_string(row["prompt"], f"{place}: `prompt`")
        return row
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: `messages` must be a list of turns, got {messages!r}")
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{place}: turn {number} must have `role` and `content`, got {turn!r}")
        _check_string(turn.get("content"), f"{place}: `content` of turn {number}")
    if messages[-1]["role"] != "user":
        raise ValueError(f"{place}: the last turn must be the user's, and is the {messages[-1]['role']}'s")
    return row


def _check_string(value: object, what: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a text, got {value!r}")
    try:
        check_text(value)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
