"""Conversations as tokens: the tokenizer's own chat template, and which of its tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers' `return_assistant_tokens_mask` goes by.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer without a chat template.

    Raises:
        ValueError: it has none.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"conversations are written by the tokenizer's chat template, and {tokenizer.name_or_path or 'this one'} "
            "has none: take the chat variant of the model, or give rows with `prompt` and `completion` as strings"
        )


def conversation_tokens(
    messages: Sequence[dict[str, str]], first: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """A conversation in the tokenizer's chat template.

    Where the template marks what the assistant generates (`{% generation %}`), its marks say which tokens are learnt.
    Elsewhere an assistant's turn is what stands between the conversation before it, written with the prompt of a
    generation, and the conversation up to its end; both must be beginnings of the whole.

    Args:
        messages (sequence of dict): `role` and `content`, the assistant's among them.
        first (int): index of the first message that may be learnt.
        tokenizer (PreTrainedTokenizerBase): with a chat template.

    Returns:
        tuple of two lists of int: token ids, and as many times 1 for the assistant's and 0 for others'.

    Raises:
        ValueError: the template refuses the conversation, or does not tell the assistant's turns.
    """
    from jinja2 import TemplateError

    messages = list(messages)
    try:
        if _MARK.search(tokenizer.get_chat_template()):
            return _by_marks(messages, first, tokenizer)
        return _by_prefixes(messages, first, tokenizer)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _by_marks(
    messages: list[dict[str, str]], first: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, learnt = made["input_ids"], made["assistant_masks"]
    if first:
        (before,) = _encoded([_rendered(messages[:first], tokenizer, prompt=True)], tokenizer)
        start = _shared(before, ids)
        learnt = [0] * start + learnt[start:]
    if 1 not in learnt:
        raise ValueError("the generation marks of the tokenizer's chat template stand around nothing of it")
    return ids, learnt


def _by_prefixes(
    messages: list[dict[str, str]], first: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    whole = _rendered(messages, tokenizer)
    prefixes = []
    for number, message in enumerate(messages):
        if number < first or message["role"] != "assistant":
            continue
        if number == 0:
            raise ValueError("it begins with the assistant, before whose first message there must be one to answer")
        before = _rendered(messages[:number], tokenizer, prompt=True)
        after = _rendered(messages[: number + 1], tokenizer)
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            raise ValueError(
                f"the tokenizer's chat template writes the conversation up to message {number} otherwise than the "
                "whole, so that it cannot be told what the assistant is to learn: give the tokenizer a template with "
                "{% generation %} marks, or rows that end with the assistant's first message"
            )
        if message["content"].strip() not in after[len(before) :]:
            raise ValueError(f"the tokenizer's chat template leaves out what message {number} says")
        prefixes += [before, after]
    ids, *parts = _encoded([whole, *prefixes], tokenizer)
    # A token across a boundary, which texts that are joined may make, belongs to what follows.
    ends = [_shared(part, ids) for part in parts]
    learnt = [0] * len(ids)
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        learnt[start:end] = [1] * (end - start)
    return ids, learnt


def _rendered(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _shared(part: list[int], whole: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
