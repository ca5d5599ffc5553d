"""The forms that a row of training data may have, by its columns, and what a row of each must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rosa.data.files import kind
from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN

# Whose turn it is, by the names that are in use; only the assistant's turns are learnt.
ASSISTANT = "assistant"
_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", ASSISTANT: ASSISTANT,
    "gpt": ASSISTANT, "tool": "tool",
}  # fmt: skip


class Form(NamedTuple):
    """A form of rows.

    Attributes:
        name (str): one of DATA_FORMS.
        prompts (str): one of `prompt_form.FORMS`: how prompts are written, and what a checked row holds. INSTRUCTION:
            `instruction`, `input` and `output`. CHAT: `messages`, and `first`, the index of the first that may be
            learnt. PLAIN: `prompt` and `completion`.
        noun (str): what to call its rows.
        check (callable): from a row that is an object, and its place, to the checked row.
    """

    name: str
    prompts: str
    noun: str
    check: Callable[[dict, str], dict]


def find_form(row: object, place: str, name: str | None = None) -> Form:
    """The form of a row, by its columns.

    `text` beside the columns of another form is that form written out, as in Alpaca's data, and does not count.

    Args:
        row (object): the first of the data.
        place (str): where it stands.
        name (str, optional): the form's, in place of what the columns say.

    Raises:
        ValueError: no form has these columns, or several.
    """
    columns = row.keys() if isinstance(row, dict) else ()
    if name is None:
        found = [form for form, wanted in _COLUMNS.items() if any(columns >= one for one in wanted)] if columns else []
        found = [form for form in found if form != "text"] or found
        if not found:
            got = f"only {', '.join(columns) or 'nothing'}" if isinstance(row, dict) else kind(row)
            raise ValueError(f"{place}: must have {_WANTED}, got {got}")
        if len(found) > 1:
            raise ValueError(
                f"{place}: the columns {', '.join(columns)} may be read as {' or as '.join(found)}: say which with "
                "--data_format"
            )
        (name,) = found
    if name == "prompt_completion" and isinstance(row, dict) and isinstance(row.get("prompt"), list):
        return _MESSAGES
    return _FORMS[name]


def check_row(form: Form, row: object, place: str) -> dict:
    """The row as `Form.prompts` has it.

    Raises:
        ValueError: it does not fit the form; the message names the place and the field.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place}: must be an object, got {kind(row)}")
    return form.check(row, place)


def check_instruction(row: object, place: str, target: str | None = "output") -> dict:
    """A row with `instruction`, and `input` set to "" where it was absent or null; every other field as it came.

    Args:
        row (object): what stands there.
        place (str): where.
        target (str, optional): the field that it must have beside `instruction`.

    Raises:
        ValueError: a field is missing or not a string.
    """
    required = ("instruction",) if target is None else ("instruction", target)
    if not isinstance(row, dict):
        names = " and ".join(f"`{field}`" for field in required)
        raise ValueError(f"{place}: must be an object with {names}, got {kind(row)}")
    for field in required:
        _field(row, field, place)
    row = {**row, "input": "" if row.get("input") is None else row["input"]}
    for field in (*required, "input"):
        _string(row[field], f"`{field}`", place)
    return row


def conversation(row: Mapping, place: str) -> list[dict[str, str]]:
    """All turns of a row with `messages` or `conversations`, and perhaps `system`.

    Args:
        row (mapping): what stands there.
        place (str): where.

    Returns:
        list of dict: `role`, one of the names that chat templates know, and `content`, a string.

    Raises:
        ValueError: something of it is no turn, or has to do with tools.
    """
    field = _turns_field(row)
    if row.get("tools"):
        raise ValueError(f"{place}: has `tools`, and calls of tools are not supported")
    turns = turns_of(row, field, place)
    if row.get("system"):
        turns = [{"role": "system", "content": _string(row["system"], "`system`", place)}, *turns]
    return turns


def turns_of(row: Mapping, field: str, place: str) -> list[dict[str, str]]:
    """The turns in one field of a row; as for `conversation`."""
    turns = _field(row, field, place)
    if not isinstance(turns, list):
        raise ValueError(f"{place}: `{field}` must be a list of messages, got {kind(turns)}")
    return [_turn(turn, f"`{field}`, message {number}", place) for number, turn in enumerate(turns)]


def _turns_field(row: Mapping) -> str:
    return "conversations" if "conversations" in row and "messages" not in row else "messages"


def _conversation(row: dict, place: str) -> dict:
    return _learnable(conversation(row, place), 0, _turns_field(row), place)


def _messages(row: dict, place: str) -> dict:
    prompt, completion = (turns_of(row, field, place) for field in ("prompt", "completion"))
    return _learnable([*prompt, *completion], len(prompt), "completion", place)


def _plain(row: dict, place: str) -> dict:
    texts = {field: _string(_field(row, field, place), f"`{field}`", place) for field in ("prompt", "completion")}
    if not any(texts.values()):
        raise ValueError(f"{place}: `prompt` and `completion` are empty")
    return texts


def _text(row: dict, place: str) -> dict:
    text = _string(_field(row, "text", place), "`text`", place)
    if not text:
        raise ValueError(f"{place}: `text` is empty")
    return {"prompt": "", "completion": text}


def _turn(turn: object, name: str, place: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"{place}: {name} must be an object with `role` and `content`, got {kind(turn)}")
    role_field, content_field = ("from", "value") if "from" in turn else ("role", "content")
    if turn.get("tool_calls"):
        raise ValueError(f"{place}: {name} has `tool_calls`, and calls of tools are not supported")
    role = turn.get(role_field)
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{place}: {name}: `{role_field}` must be one of {', '.join(_ROLES)}, got {kind(role)}")
    return {"role": _ROLES[role], "content": _content(turn.get(content_field), f"{name}: `{content_field}`", place)}


def _content(value: object, name: str, place: str) -> str:
    """A string as it is, and the texts of parts after each other."""
    if not isinstance(value, list) or not value:
        return _string(value, name, place)
    return "".join(_part(part, f"{name}, part {number}", place) for number, part in enumerate(value))


def _part(part: object, name: str, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        got = f"type {part.get('type')}" if isinstance(part, dict) else kind(part)
        raise ValueError(f"{place}: {name} must be of type text, got {got}")
    return _string(part.get("text"), f"{name}: `text`", place)


def _learnable(turns: list[dict[str, str]], first: int, field: str, place: str) -> dict:
    """The turns up to the last of the assistant's: of what follows nothing is learnt."""
    last = max((i for i, turn in enumerate(turns) if i >= first and turn["role"] == ASSISTANT), default=None)
    if last is None:
        raise ValueError(f"{place}: `{field}` has no message of the assistant, and so nothing to learn")
    return {"messages": turns[: last + 1], "first": first}


def _field(row: Mapping, field: str, place: str) -> object:
    if field not in row:
        raise ValueError(f"{place}: has no `{field}`, only {', '.join(row) or 'nothing'}")
    return row[field]


def _string(value: object, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name} must be a string, got {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {name} holds half a surrogate pair at character {error.start}, which stands for no text"
        ) from error
    return value


_FORMS = {
    form.name: form
    for form in (
        Form("conversations", CHAT, "conversations", _conversation),
        Form("prompt_completion", PLAIN, "prompts with completions", _plain),
        Form("instruction", INSTRUCTION, "instructions", check_instruction),
        Form("text", PLAIN, "texts", _text),
    )
}
_MESSAGES = Form("prompt_completion", CHAT, "prompts with completions", _messages)
DATA_FORMS = tuple(_FORMS)
_COLUMNS = {
    "conversations": ({"messages"}, {"conversations"}),
    "prompt_completion": ({"prompt", "completion"},),
    "instruction": ({"instruction"},),
    "text": ({"text"},),
}
_WANTED = "`messages` or `conversations`, `prompt` and `completion`, `instruction` and `output`, or `text`"
