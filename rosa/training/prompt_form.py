"""How an adapter's prompts are written: what its training rows were like, kept beside it for those who use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rosa.adapters.folder import FORM_NAME
from rosa.storage.files import replace_text
from rosa.storage.parsing import parse_object
from rosa.training.data import prompt, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The paper's prompt around an instruction, the tokenizer's chat template, or the text as it is.
FORMS = INSTRUCTION, CHAT, PLAIN = ("instruction", "chat", "plain")


def save_form(folder: Path, form: str) -> None:
    """Writes beside an adapter which of FORMS its rows had."""
    replace_text(folder / FORM_NAME, json.dumps({"form": form}) + "\n")


def read_form(folder: Path) -> str:
    """Which of FORMS the rows of an adapter had.

    Args:
        folder (Path): the adapter's.

    Returns:
        str: INSTRUCTION where nothing was written, as adapters were from before there were other forms.

    Raises:
        ValueError: what was written is damaged, or no form that is known here.
    """
    file = folder / FORM_NAME
    if not file.is_file():
        return INSTRUCTION
    try:
        form = parse_object(file.read_bytes()).get("form")
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if form not in FORMS:
        raise ValueError(f"{file}: the form must be one of {', '.join(FORMS)}, got {form!r}")
    return form


def question_ids(form: str, tokenizer: PreTrainedTokenizerBase, instruction: str, input: str = "") -> list[int]:
    """The token ids of a question as an adapter of this form is asked it, up to where its answer begins.

    Args:
        form (str): one of FORMS.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer; for CHAT it must have a chat template.
        instruction (str): the question.
        input (str): further context; in CHAT and PLAIN it follows after an empty line.

    Raises:
        ValueError: the form is CHAT and there is no chat template, or it has no place for a user's turn.
    """
    if form == INSTRUCTION:
        return prompt_ids([prompt(instruction, input)], tokenizer)[0]
    text = f"{instruction}\n\n{input}" if input else instruction
    if form == PLAIN:
        return prompt_ids([text], tokenizer)[0]
    return chat_ids([{"role": "user", "content": text}], tokenizer)


def chat_ids(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a conversation by the tokenizer's chat template, up to where the next answer begins.

    The template writes the special tokens itself, one that begins a text among them, so none is added.

    Args:
        messages (sequence of mapping): turns with `role` and `content`, the last of them the user's.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer.

    Raises:
        ValueError: there is no chat template, or it refuses these turns.
    """
    from jinja2 import TemplateError

    try:
        found = tokenizer.apply_chat_template([*messages], add_generation_prompt=True, tokenize=True, return_dict=True)
    except (ValueError, TemplateError) as error:
        raise ValueError(f"the tokenizer's chat template cannot be used: {error}") from error
    return list(found["input_ids"])
