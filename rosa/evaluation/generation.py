"""Greedy decoding of many prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from rosa.adapters.by_row import adapters_by_row
from rosa.data.conversation import turn_end
from rosa.data.prompt_form import CHAT, PLAIN
from rosa.data.prompts import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What of a model's own generation config is no matter of decoding: its special tokens, its cache, its compilation.
_KEPT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation", "cache_config", "max_cache_len",
    "prefill_chunk_size", "compile_config", "disable_compile",
}  # fmt: skip


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    form: str = PLAIN,
    adapters: Sequence[str | None] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> list[str]:
    """Continue each prompt greedily, until a token that ends a sequence or `max_new_tokens`.

    Neither the tokenizer nor the model's training mode is changed.

    Args:
        model (PreTrainedModel): a causal language model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        prompts (sequence of str or of token ids): the texts to continue, verbatim, or their ids; see
            `rosa.data.prompts.prompt` and `rosa.data.prompts.question_ids`.
        form (str): one of `rosa.data.prompt_form.FORMS`, CHAT where any of the prompts is asked so: what ends a turn by
            the chat template ends all answers then.
        adapters (sequence of str or None, optional): the adapter of each prompt, as `rosa.adapters_by_row` takes them;
            None answers all as the model is.
        max_new_tokens (int): most tokens to generate for a prompt.
        batch_size (int): prompts decoded together; the answers do not depend on it.

    Returns:
        list of str: the new text alone, stripped, without special tokens and without what ended it; in the order of
        `prompts`.

    Raises:
        TypeError: `prompts` is one string.
        ValueError: a number below 1, a prompt that is no text or has no token, no token that could end an answer,
            more or fewer adapters than prompts, or what `rosa.adapters_by_row` refuses.
        KeyError: the model has no such adapter.
    """
    options = {"form": form, "adapters": adapters, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return [text for _, text in sorted(answers(model, tokenizer, prompts, **options))]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    form: str = PLAIN,
    adapters: Sequence[str | None] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> Iterator[tuple[int, str]]:
    """The answers of `answer` as they come, a batch at a time, the shortest prompts first.

    Args, Raises: those of `answer`.

    Yields:
        (int, str): the index of a prompt, and its answer.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of strings, got one string")
    check_options(max_new_tokens, batch_size)
    texts = {index: text for index, text in enumerate(prompts) if isinstance(text, str)}
    for index, text in texts.items():
        try:
            check_text(text)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
    if adapters is not None and len(adapters) != len(prompts):
        raise ValueError(
            f"each prompt needs its adapter: there are {len(prompts)} prompts and {len(adapters)} adapters"
        )
    if not prompts:
        return
    with _by_row(model, adapters):
        pass  # what is wrong with them is told before the first answer
    ids = iter(prompt_ids(list(texts.values()), tokenizer) if texts else [])
    rows = [next(ids) if index in texts else list(given) for index, given in enumerate(prompts)]
    if not all(rows):
        raise ValueError(f"prompt {rows.index([])} holds no token")
    stop = stop_ids(model, tokenizer, form)
    pad = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with evaluating(model), _by_row(model, adapters and [adapters[index] for index in batch]):
            new = _continue(model, [rows[index] for index in batch], max_new_tokens, stop, pad)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        yield from zip(batch, (text.strip() for text in texts), strict=True)


def _by_row(model: PreTrainedModel, adapters: Sequence[str | None] | None) -> AbstractContextManager:
    return nullcontext() if adapters is None else adapters_by_row(model, adapters)


def _continue(
    model: PreTrainedModel, rows: list[list[int]], max_new_tokens: int, stop: list[int], pad: int
) -> list[list[int]]:
    """Generate, without gradients, from a batch of token ids; returns the new ids of each row up to what ends it."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    options = greedy(model) | {"max_new_tokens": max_new_tokens, "eos_token_id": stop, "pad_token_id": pad}
    output = model.generate(input_ids=ids, attention_mask=mask, **options)
    new = output[:, width:].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in stop), None)] for row in new]


def greedy(model: PreTrainedModel) -> dict[str, object]:
    """The options of `generate` for greedy decoding, whatever the model's own generation config asks for.

    What it asks for is put aside, but for `_KEPT`: a repetition penalty, for one, would count the padding.
    """
    asked = model.generation_config.to_dict()
    aside = {name: None for name, value in asked.items() if value is not None and name not in _KEPT}
    return aside | {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str) -> list[int]:
    """What ends an answer: the tokens that training teaches to end with, and those that the model came with.

    Args:
        model (PreTrainedModel): a causal language model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        form (str): of the prompts, one of `rosa.data.prompt_form.FORMS`. Of all of them training teaches the
            tokenizer's EOS, but of CHAT what ends a turn by the chat template.

    Returns:
        list of int: in ascending order.

    Raises:
        ValueError: there is none.
    """
    own = model.generation_config.eos_token_id
    turn = turn_end(tokenizer) if form == CHAT else None
    ids = {tokenizer.eos_token_id, turn, *(own if isinstance(own, list) else [own])} - {None}
    if not ids:
        raise ValueError(f"neither {type(tokenizer).__name__} nor the model has a token that ends a sequence")
    return sorted(ids)


def check_options(max_new_tokens: int, batch_size: int) -> None:
    """Raises a ValueError if a number is below 1."""
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_text(text: str) -> None:
    """Raises a ValueError if a string holds half of a surrogate pair, JSON's "\\udc80" say: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"character {error.start} is {half}, half of a surrogate pair, and no text") from error


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
