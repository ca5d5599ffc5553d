"""Instruction data: reading and checking it, the paper's prompt, and tokenised training examples."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100

_PLAIN = (
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
    return (_WITH_INPUT if input else _PLAIN).format(instruction=instruction, input=input)


def load_rows(data: str, split: str = "train", *, target: str | None = "output") -> list[dict]:
    """Read instruction data and check every row.

    Args:
        data (str): a .json file (a list of objects), a .jsonl file (one object a line), or the name of a dataset for
            `datasets.load_dataset`. A row has the strings `instruction` and `output`, and may have `input`.
        split (str): the split of a named dataset; files have none.
        target (str, optional): the field to find beside `instruction`; "answer" for the rows of a test, None for rows
            that wait for an answer.

    Returns:
        list of dict: the rows as they came, with `input` set to "" where it was absent or null.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: the data holds no rows, is not in this form, or a field is missing or not a string; the message
            names the place.
    """
    rows = [check_instruction(row, place, target) for place, row in read_rows(data, split)]
    if not rows:
        raise ValueError(f"{data} holds no rows")
    return rows


def read_rows(data: str, split: str = "train") -> Iterator[tuple[str, object]]:
    """The rows of a file or a dataset as they come, each behind its place in words.

    Args, Raises: those of `load_rows`, but for what it finds in a row.
    """
    path = Path(data)
    if path.suffix in (".json", ".jsonl"):
        numbered = _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)
    elif path.exists():
        raise ValueError(f"{data}: training data must be a .json or .jsonl file or the name of a dataset")
    else:
        numbered = _numbered(dataset_rows(data, split))
    return ((f"{data}, {place}", row) for place, row in numbered)


def dataset_rows(
    name: str, split: str, *, config: str | None = None, revision: str | None = None
) -> Iterable[dict[str, object]]:
    """The rows of a dataset of the hub, as they come.

    Args:
        name (str): for `datasets.load_dataset`.
        split (str): one of its splits; "train+test" for two.
        config (str, optional): the configuration, of a dataset that has several.
        revision (str, optional): branch, tag or commit; None is "main".

    Returns:
        iterable of dict: a row each.

    Raises:
        FileNotFoundError: there is no such dataset, or it cannot be reached.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{name} is neither a file here nor a dataset that can be reached: {error}") from error


def tokenize(
    rows: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    train_on_prompt: bool = False,
) -> Dataset:
    """Turn rows into training examples: prompt, response, end-of-sequence token.

    Prompt and response are tokenised apart and joined, so that the prompt's tokens are those that generation sees.
    Rows that truncation leaves without anything to learn are left out, with a warning. So is said how many lose the end
    of their response, and the end-of-sequence token with it: put after half a sentence, it would teach to stop there.

    Args:
        rows (sequence of dict): rows of `load_rows`.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer; it must have an eos_token.
        max_length (int): tokens after which a row is cut off.
        train_on_prompt (bool): learn the prompt too, instead of the response alone.

    Returns:
        datasets.Dataset: `input_ids`, `attention_mask` and `labels`, held in memory, unpadded.

    Raises:
        ValueError: no rows, no eos_token, or truncation leaves no row with a token to learn.
    """
    from datasets import Dataset

    if not rows:
        raise ValueError("there are no rows to tokenize")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos_token, so a model could not learn where to stop")
    prompts = prompt_ids([prompt(row["instruction"], row.get("input") or "") for row in rows], tokenizer)
    responses = tokenizer([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
    examples = [
        _example(prompt, [*response, tokenizer.eos_token_id], max_length, train_on_prompt)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    kept = _learnable(examples, max_length)
    longer = sum(len(p) + len(r) + 1 > max_length for p, r in zip(prompts, responses, strict=True))
    cut = longer - (len(examples) - len(kept))
    if cut:
        warnings.warn(
            f"max_length={max_length} cuts off the end of the response of {cut} of {len(rows)} rows, which then do not "
            "teach where to stop; raise it to learn them whole",
            stacklevel=2,
        )
    return Dataset.from_list(kept)


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


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    rows = _parse(read_text(path), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects, got {_kind(rows)}")
    return _numbered(rows)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    # Not splitlines: a JSON string may hold U+2028 and other separators as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse(line, str(path), first_line=number)


def _numbered(rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((f"row {index}", row) for index, row in enumerate(rows))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}" if not path.exists() else f"{path} is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _parse(text: str, path: str, first_line: int = 1) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path} is not valid JSON: line {line}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path} holds lists or objects that are nested too deeply to be read") from error


def check_instruction(row: object, place: str, target: str | None) -> dict:
    """A row of `load_rows`, checked; the errors name its place."""
    required = ("instruction",) if target is None else ("instruction", target)
    if not isinstance(row, dict):
        names = " and ".join(f"`{field}`" for field in required)
        raise ValueError(f"{place}: must be an object with {names}, got {_kind(row)}")
    for field in required:
        if field not in row:
            raise ValueError(f"{place}: has no `{field}`, only {', '.join(row) or 'nothing'}")
    row = {**row, "input": "" if row.get("input") is None else row["input"]}
    for field in (*required, "input"):
        if not isinstance(row[field], str):
            raise ValueError(f"{place}: `{field}` must be a string, got {_kind(row[field])}")
        try:
            row[field].encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place}: `{field}` holds half a surrogate pair at character {error.start}, which stands for no text"
            ) from error
    return row


def _kind(value: object) -> str:
    """What a JSON value is, and, if it is short, the value."""
    name = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    text = json.dumps(value, default=str)
    return name.get(type(value), "a number") + (f" {text}" if value is not None and len(text) <= 40 else "")


def _example(prompt: list[int], response: list[int], max_length: int, train_on_prompt: bool) -> dict[str, list[int]]:
    ids = (prompt + response)[:max_length]
    labels = ids if train_on_prompt else ([IGNORED_LABEL] * len(prompt) + response)[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _learnable(examples: list[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """The examples with a label: a batch of none but the others would have a loss of 0/0."""
    kept = [example for example in examples if example["labels"][-1] != IGNORED_LABEL]
    if not kept:
        raise ValueError(f"max_length={max_length} cuts off the whole response of every row; raise it")
    if len(kept) < len(examples):
        left_out = len(examples) - len(kept)
        message = f"max_length={max_length} cuts off the whole response of {left_out} of {len(examples)} rows"
        warnings.warn(f"{message}; they are left out", stacklevel=3)
    return kept
