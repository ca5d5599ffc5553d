"""The prompts of training and of generation: texts, and the token ids that an adapter is to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosa.data.prompt_form import INSTRUCTION, PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def prompt(instruction: str, input: str = "") -> str:
    """The paper's prompt (Alpaca's), up to where the response begins.

    Args:
        instruction (str): the task.
        input (str): further context for the task; empty for none.

    Returns:
        str: the text that the model is to continue.
    """
    return (_WITH_INPUT if input else _WITHOUT_INPUT).format(instruction=instruction, input=input)


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise prompts as training and generation both see them.

    Args:
        prompts (sequence of str): at least one text.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer.

    Returns:
        list of list of int: token ids, with the special tokens that the tokenizer puts first and no EOS at the end.
    """
    ids = tokenizer(list(prompts))["input_ids"]
    # Some tokenizers end every text with EOS (Llama's add_eos_token); here the response is yet to come.
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        ids = [row[:-1] for row in ids]
    return ids


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
