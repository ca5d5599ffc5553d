"""The tokens that a model learns from: training examples made of rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rosa.data.conversation import conversation_tokens
from rosa.data.prompt_form import CHAT, INSTRUCTION
from rosa.data.prompts import prompt, prompt_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100


def tokenize(
    rows: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    train_on_prompt: bool = False,
    form: str = INSTRUCTION,
    places: Sequence[str] | None = None,
) -> Dataset:
    """Turn rows into training examples: prompt, response, end-of-sequence token, or a conversation by the template.

    Prompt and response are tokenised apart and joined, so that the prompt's tokens are those that generation sees.
    Rows that truncation leaves without anything to learn are left out, with a warning. So is said how many lose the end
    of their response, and the end-of-sequence token with it: put after half a sentence, it would teach to stop there.

    Args:
        rows (sequence of dict): rows of `rows.load_rows`, or of another form as `forms.Form` says.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer; it must have an eos_token, for conversations a chat
            template instead.
        max_length (int): tokens after which a row is cut off.
        train_on_prompt (bool): learn the prompt too, instead of the response alone.
        form (str): one of `prompt_form.FORMS`.
        places (sequence of str, optional): where each row stands, for errors.

    Returns:
        datasets.Dataset: `input_ids`, `attention_mask` and `labels`, held in memory, unpadded.

    Raises:
        ValueError: no rows, no eos_token, a conversation that the template does not fit, or truncation leaves no row
            with a token to learn.
    """
    made = sequences(rows, tokenizer, form, places)
    return examples(made, max_length=max_length, train_on_prompt=train_on_prompt)


def examples(
    made: Sequence[tuple[list[int], list[int]]], *, max_length: int = 2048, train_on_prompt: bool = False
) -> Dataset:
    """The training examples of rows of `sequences`, as `tokenize` makes them, with its warnings and errors."""
    from datasets import Dataset

    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    cut_off = [example(ids, learnt, max_length, train_on_prompt) for ids, learnt in made]
    kept = [row for row in cut_off if teaches(row)]
    if not kept:
        raise ValueError(f"max_length={max_length} cuts off the whole response of every row; raise it")
    left_out = len(made) - len(kept)
    if left_out:
        message = f"max_length={max_length} cuts off the whole response of {left_out} of {len(made)} rows"
        warnings.warn(f"{message}; they are left out", stacklevel=3)
    cut = sum(len(ids) > max_length for ids, _ in made) - left_out
    if cut:
        warnings.warn(
            f"max_length={max_length} cuts off the end of the response of {cut} of {len(made)} rows, which then do not "
            "teach where to stop; raise it to learn them whole",
            stacklevel=3,
        )
    return Dataset.from_list(kept)


def sequences(
    rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, form: str, places: Sequence[str] | None = None
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each row, whole, and as many times 1 for those of the response and 0 for those before it.

    The arguments and the errors are those of `tokenize`.
    """
    if not rows:
        raise ValueError("there are no rows to tokenize")
    if form == CHAT:
        return [
            _conversation(row, tokenizer, places[number] if places else f"row {number}")
            for number, row in enumerate(rows)
        ]
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos_token, so a model could not learn where to stop")
    if form == INSTRUCTION:
        texts = [(prompt(row["instruction"], row.get("input") or ""), row["output"]) for row in rows]
    else:
        texts = [(row["prompt"], row["completion"]) for row in rows]
    prompts, responses = zip(*texts, strict=True)
    responses = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    return [
        ([*before, *response, tokenizer.eos_token_id], [0] * len(before) + [1] * (len(response) + 1))
        for before, response in zip(prompt_ids(prompts, tokenizer), responses, strict=True)
    ]


def example(ids: list[int], learnt: list[int], max_length: int, train_on_prompt: bool = False) -> dict[str, list[int]]:
    """A training example of a row of `sequences`, cut off after `max_length` tokens."""
    ids = ids[:max_length]
    labels = ids if train_on_prompt else [i if of_it else IGNORED_LABEL for i, of_it in zip(ids, learnt, strict=False)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def teaches(example: dict[str, list[int]]) -> bool:
    """Whether a token is predicted that is to be learnt: a batch without any would have a loss of 0/0."""
    return any(label != IGNORED_LABEL for label in example["labels"][1:])


def _conversation(row: dict, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[list[int], list[int]]:
    try:
        return conversation_tokens(row["messages"], row["first"], tokenizer)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
