"""Conversations as tokens: the tokenizer's own chat template, and which of its tokens are the assistant's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers' `return_assistant_tokens_mask` goes by.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that conversations cannot be written with.

    Raises:
        ValueError: it has no chat template, or is none of the library tokenizers, which tell where a token stands.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"conversations are written by the tokenizer's chat template, and {tokenizer.name_or_path or 'this one'} "
            "has none: take the chat variant of the model, or give rows with `prompt` and `completion` as strings"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens stand, without which it cannot be "
            "told what of a conversation is the assistant's: give rows with `prompt` and `completion` as strings"
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


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a turn of the assistant, as `conversation_tokens` has it learnt.

    Returns:
        int or None: the first special or added token behind what the assistant says; None where the template has none
        there, or where conversations cannot be learnt by it.
    """
    try:
        check_chat_template(tokenizer)
        one, other = (_learnt_of(content, tokenizer) for content in ("yes", "no"))
    except ValueError:
        return None
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    behind = [token for token, _ in shared][::-1]
    added = tokenizer.added_tokens_decoder  # some vocabularies have runs of white space among them
    return next((token for token in behind if token in added and not added[token].content.isspace()), None)


def _learnt_of(content: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that are learnt of an answer."""
    turns = [{"role": "user", "content": "yes or no"}, {"role": "assistant", "content": content}]
    ids, learnt = conversation_tokens(turns, 0, tokenizer)
    return [token for token, of_it in zip(ids, learnt, strict=True) if of_it]


def _by_marks(
    messages: list[dict[str, str]], first: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    offsets = {"return_offsets_mapping": True}
    made = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=offsets
    )
    learnt = made["assistant_masks"]
    if first:
        whole, before = _rendered(messages, tokenizer), _rendered(messages[:first], tokenizer, prompt=True)
        same = commonprefix([whole, before])  # noqa: RUF071, characters are what is asked for
        start = _tokens_of(len(same), made["offset_mapping"])
        learnt = [0] * start + learnt[start:]
    if 1 not in learnt:
        raise ValueError("the generation marks of the tokenizer's chat template stand around nothing of it")
    return made["input_ids"], learnt


def _by_prefixes(
    messages: list[dict[str, str]], first: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    whole = _rendered(messages, tokenizer)
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    learnt = [0] * len(made["input_ids"])
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
        start, end = (_tokens_of(len(prefix), made["offset_mapping"]) for prefix in (before, after))
        learnt[start:end] = [1] * (end - start)
    return made["input_ids"], learnt


def _rendered(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _tokens_of(characters: int, offsets: Sequence[tuple[int, int]]) -> int:
    """How many tokens lie within the first characters of a text. By their ends: some tokenizers leave white space out
    of where a token begins. A token across the boundary, which a line break on either side may make, lies behind it."""
    return next((number for number, (_, end) in enumerate(offsets) if end > characters), len(offsets))
