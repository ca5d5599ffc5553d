"""How an adapter's prompts are written: what its training rows were like, kept beside it for those who use it."""

from __future__ import annotations

import json
from pathlib import Path

from rosa.adapters.folder import FORM_NAME
from rosa.storage.files import replace_text
from rosa.storage.parsing import parse_object

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
