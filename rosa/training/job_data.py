"""The data of a training job: its rows found, checked, split and tokenised, in memory or as a stream."""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase, TrainingArguments

from rosa.adapters.pretrained import load_tokenizer
from rosa.data.conversation import check_chat_template
from rosa.data.files import Source, read_rows
from rosa.data.forms import Form, check_row
from rosa.data.prompt_form import CHAT
from rosa.data.rows import read_learnable
from rosa.data.tokens import example, examples, sequences, teaches
from rosa.storage.digest import file_digest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from rosa.training.finetune_arguments import FinetuneArguments

SHUFFLED = 1000  # tokenised rows that a stream holds, from which it draws the next

_COMMIT = re.compile("[0-9a-f]{40}")


class Row(NamedTuple):
    """A checked row, and where it stands."""

    value: dict
    place: str


class JobData(NamedTuple):
    """What a job trains on.

    Attributes:
        tokenizer (PreTrainedTokenizerBase): with a token for padding.
        form (Form): of the rows.
        train (Dataset or IterableDataset): the examples to train on.
        validation (Dataset or None): those held out.
        identity (callable): makes what a checkpoint knows the data by: all rows, or a stream's files by their digests,
            for which it reads them.
        lengths (list of int): tokens of each row to train on, before it is cut off; of a stream none.
        summary (str): the data in a line.
    """

    tokenizer: PreTrainedTokenizerBase
    form: Form
    train: Dataset | IterableDataset
    validation: Dataset | None
    identity: Callable[[], Sequence[Any]]
    lengths: list[int]
    summary: str


def prepare(job: FinetuneArguments, args: TrainingArguments, *, limit: int | None = None) -> JobData:
    """Reads the data of a job, and then its tokenizer.

    Args:
        job (FinetuneArguments): the data, how it is to be read, the model.
        args (TrainingArguments): the seed, and how rows are put together.
        limit (int, optional): look at no more rows than these, and hold them in memory.

    Raises:
        FileNotFoundError: the data or the model is not there.
        ValueError: a row does not fit, there are too few, the tokenizer has no chat template for conversations, or a
            stream is to be resumed that cannot be known again.
    """
    source = Source(job.data, job.data_split, job.data_config, job.data_revision)
    form, found = read_learnable(source, job.data_format, streaming=job.streaming)
    rows = (Row(value, place) for value, place in found)
    if job.streaming and limit is None:
        return _streamed(job, args, source, form, list(islice(rows, job.val_size)))
    everything = list(islice(rows, limit))
    train, held_out = split(everything, job.val_size, args.seed)
    tokenizer = _tokenizer(job, form)
    made = _sequences(train, form, tokenizer)
    train_examples = _examples(made, job)
    _check_last_batch(args, len(train_examples))
    return JobData(
        tokenizer,
        form,
        train_examples,
        _examples(_sequences(held_out, form, tokenizer), job) if held_out else None,
        lambda: [row.value for row in everything],
        [len(ids) for ids, _ in made],
        f"data: {len(everything):,} {form.noun}{_files(source)}",
    )


def split(rows: Sequence, val_size: float, seed: int) -> tuple[list, list]:
    """The rows to train on and, drawn at random, the `val_size` rows to hold out, below 1 the share of them."""
    number = math.ceil(val_size * len(rows)) if 0 < val_size < 1 else int(val_size)
    if not 0 <= number < len(rows):
        raise ValueError(f"val_size must leave at least one of the {len(rows)} rows to train on, got {val_size}")
    held_out = set(random.Random(seed).sample(range(len(rows)), number))
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _check_last_batch(args: TrainingArguments, rows: int) -> None:
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: {rows} rows are less than a batch of {batch}"
        )


def _files(source: Source) -> str:
    number = len(source.files())
    return "" if number == 0 else f", {number} file{'s' if number > 1 else ''}"


def _tokenizer(job: FinetuneArguments, form: Form) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(job.model)
    if form.prompts == CHAT:
        check_chat_template(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _sequences(rows: list[Row], form: Form, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    return sequences([row.value for row in rows], tokenizer, form.prompts, [row.place for row in rows])


def _examples(made: list[tuple[list[int], list[int]]], job: FinetuneArguments) -> Dataset:
    return examples(made, max_length=job.max_length, train_on_prompt=job.train_on_prompt)


def _streamed(
    job: FinetuneArguments, args: TrainingArguments, source: Source, form: Form, held_out: list[Row]
) -> JobData:
    """The rows after the first `val_size`, again and again, and a thousand of them mixed at a time."""
    from datasets import IterableDataset

    if len(held_out) < job.val_size:
        raise ValueError(f"val_size takes the first rows of a stream, and {job.data} has {len(held_out)} alone")
    if job.resume and not source.files() and not _COMMIT.fullmatch(source.revision or ""):
        raise ValueError(
            f"--resume of a stream from the hub needs rows that stay as they are: give --data_revision the commit of "
            f"{job.data} (40 hexadecimal digits)"
        )
    tokenizer = _tokenizer(job, form)
    train = IterableDataset.from_generator(_Stream(job, source, form, tokenizer))
    # Rows that differ in length cannot be sent from one process to all: each reads them all and takes its own.
    args.accelerator_config.dispatch_batches = False
    return JobData(
        tokenizer,
        form,
        train.shuffle(seed=args.seed if args.data_seed is None else args.data_seed, buffer_size=SHUFFLED),
        _examples(_sequences(held_out, form, tokenizer), job) if held_out else None,
        lambda: [form.name, *(source if not source.files() else map(file_digest, source.files()))],
        [],
        f"data: a stream of {form.noun}{_files(source)}",
    )


class _Stream:
    """The examples of a source, from its beginning again whenever it ends."""

    def __init__(self, job: FinetuneArguments, source: Source, form: Form, tokenizer: PreTrainedTokenizerBase) -> None:
        self.job, self.source, self.form, self.tokenizer = job, source, form, tokenizer

    def __call__(self) -> Iterator[dict[str, list[int]]]:
        while True:
            found = False
            for made in self._once():
                found = True
                yield made
            if not found:
                raise ValueError(
                    f"{self.job.data} has no row to train on after the first {self.job.val_size}, or none of which "
                    f"max_length={self.job.max_length} leaves something to learn"
                )

    def _once(self) -> Iterator[dict[str, list[int]]]:
        job, told = self.job, False
        for place, value in islice(read_rows(self.source, streaming=job.streaming), job.val_size, None):
            row = check_row(self.form, value, place)
            ((ids, learnt),) = sequences([row], self.tokenizer, self.form.prompts, [place])
            made = example(ids, learnt, job.max_length, job.train_on_prompt)
            if teaches(made):
                yield made
            elif not told:
                told = True
                warnings.warn(
                    f"max_length={job.max_length} cuts off the whole response of {place}; such rows are left out",
                    stacklevel=2,
                )
