"""What `rosa train` would do, told before it is done: what is learnt of the data, how much trains, whether it fits."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from rosa.adapters.pretrained import load_shapes
from rosa.data.tokens import IGNORED_LABEL
from rosa.models.linear import linear_sites
from rosa.training.job_data import JobData, prepare
from rosa.training.memory import GIB, Memory, quantized, step_memory
from rosa.training.methods import trainable
from rosa.training.padding import epoch_padding
from rosa.training.preflight import attach_to_shapes, check, starting_point

if TYPE_CHECKING:
    from rosa.training.finetune_arguments import FinetuneArguments

EXAMPLES = 3
STREAMED = 1000  # rows that are looked at of a stream
_NO_OUTPUT = "trainer_output"  # transformers' word for none given
SHOWN = 100  # tokens at either end of an example
GREEN, PLAIN = "\033[32m", "\033[0m"


def dry_run(job: FinetuneArguments, args: TrainingArguments) -> None:
    """Print what a job would learn from and what it would take; nothing is loaded but the tokenizer, nothing written.

    Args:
        job (FinetuneArguments): as for `finetune`.
        args (TrainingArguments): as for `finetune`.

    Raises:
        ValueError, OSError: the data, the tokenizer, the model's configuration or the method's is at fault.
    """
    if args.output_dir != _NO_OUTPUT:
        starting_point(Path(args.output_dir), resume=job.resume, overwrite=job.overwrite)
    check(job, args)
    data = prepare(job, args, limit=STREAMED + job.val_size if job.streaming else None)
    looked_at = f", of which the first {len(data.lengths):,} are looked at" if job.streaming else ""
    print(f"{data.summary}{looked_at}; prompts: {data.form.prompts}")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number, example in enumerate(data.train.select(range(min(EXAMPLES, len(data.train)))), start=1):
        learnt = sum(label != IGNORED_LABEL for label in example["labels"])
        told = "in green" if colour else "in ⟦ ⟧"
        print(f"\nexample {number}: {len(example['input_ids'])} tokens, {learnt} of them learnt ({told})")
        print(show(example["input_ids"], example["labels"], data.tokenizer, colour=colour))
    print()
    for line in _counts(data, job, args):
        print(line)
    # Attention is counted as either of these: others keep as little as sdpa, and may run on a GPU alone.
    base = load_shapes(job.model, attn_implementation="eager" if job.attn_implementation == "eager" else "sdpa")
    saved_by_quantizing = _saved_by_quantizing(base, job.load_in)
    model = attach_to_shapes(job, base)
    number, total = trainable(model)
    print(f"trainable params: {number:,} || all params: {total:,} || trainable%: {100 * number / total:.4f}")
    for line in _memory(model, saved_by_quantizing, data, job, args):
        print(line)


def show(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> str:
    """The tokens of an example as text, a dot between two of them, and those that are learnt in green or brackets.

    Of a long example the middle is left out. What is no text for a terminal is written as Python writes it.
    """
    shown = [(_readable(tokenizer.decode([i])), label != IGNORED_LABEL) for i, label in zip(ids, labels, strict=True)]
    if len(shown) > 2 * SHOWN:
        left_out = len(shown) - 2 * SHOWN
        shown = [*shown[:SHOWN], (f" ... {left_out} tokens ... ", False), *shown[-SHOWN:]]
    begin, end = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    parts = []
    for learnt, tokens in groupby(shown, key=lambda token: token[1]):
        text = "·".join(token for token, _ in tokens)
        parts.append(f"{begin}{text}{end}" if learnt else text)
    return "".join(parts)


def _readable(text: str) -> str:
    """A line break stays one, behind the mark of it."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


def _counts(data: JobData, job: FinetuneArguments, args: TrainingArguments) -> Iterator[str]:
    lengths = data.lengths
    cut = sum(length > job.max_length for length in lengths)
    yield (
        f"tokens a row: from {min(lengths):,} to {max(lengths):,}, {sum(lengths) / len(lengths):,.1f} in the mean; "
        f"{cut:,} of {len(lengths):,} rows are longer than --max_length {job.max_length}, "
        f"{len(lengths) - len(data.train):,} left out"
    )
    learnt = sum(_learnt(data))
    every = sum(map(len, data.train["input_ids"]))
    yield f"learnt: {learnt:,} of {every:,} tokens, {learnt / every:.1%}"
    yield f"padding: {_padding(data, args):.1%} of the tokens{', left out' if job.padding_free else ''}"


def _learnt(data: JobData) -> list[int]:
    """Positions of each row whose next token is learnt."""
    return [sum(label != IGNORED_LABEL for label in labels[1:]) for labels in data.train["labels"]]


def _padding(data: JobData, args: TrainingArguments) -> float:
    """As the Trainer of a run would tell it, which knows the order of the rows; this one has nothing to train."""
    set_seed(args.seed)
    with TemporaryDirectory() as folder:
        args = copy.copy(args)
        args.output_dir = folder
        trainer = Trainer(
            nn.Linear(1, 1), args, train_dataset=data.train, eval_dataset=[], processing_class=data.tokenizer
        )
        return epoch_padding(trainer)


def _saved_by_quantizing(base: nn.Module, load_in: str | None) -> float:
    """Bytes by which the base becomes smaller."""
    if load_in is None:
        return 0
    weights = [site.linear.weight for site in linear_sites(base)]
    return sum(w.nbytes - quantized(w.nbytes, w.numel(), load_in, width=w.itemsize) for w in weights)


def _memory(
    model: nn.Module, saved_by_quantizing: float, data: JobData, job: FinetuneArguments, args: TrainingArguments
) -> Iterator[str]:
    card = torch.cuda.is_available() and not args.use_cpu
    rows, length = args.per_device_train_batch_size, min(job.max_length, max(data.lengths))
    # The rows of a batch that learn most.
    labels = sum(sorted(_learnt(data))[-rows:]) if job.response_logits else rows * length
    how = {"checkpoints": args.gradient_checkpointing, "bf16": args.bf16 or not card}
    try:
        need = step_memory(model, rows, length, labels, **how)
        need = need._replace(base=need.base - saved_by_quantizing)
    except ValueError as error:
        yield f"memory: {error}"
        return
    yield (
        f"memory of a step with {rows} of the longest rows, {length:,} tokens each: {_gib(sum(need))}, of it "
        f"{_gib(need.base)} frozen weights, {_gib(need.trained)} what trains with its gradients and AdamW's moments, "
        f"{_gib(need.layers)} what the layers keep for backward, {_gib(need.logits)} logits, about "
        f"{_gib(need.context)} CUDA itself"
    )
    if not card:
        yield "there is no GPU here to hold that against" if not args.use_cpu else "--use_cpu leaves the GPU alone"
        return
    yield _verdict(need)


def _verdict(need: Memory) -> str:
    found = torch.cuda.get_device_properties(0)
    name = f"{found.name} with {_gib(found.total_memory)}"
    if sum(need) <= found.total_memory:
        return f"it fits this card ({name})"
    return (
        f"it does not fit this card ({name}): a smaller --per_device_train_batch_size with more "
        "--gradient_accumulation_steps, a smaller --max_length or --gradient_checkpointing need less"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
