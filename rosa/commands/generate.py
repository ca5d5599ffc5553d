"""`rosa generate`: answer one instruction, continue one prompt, or answer a file of rows, each with its own adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from rosa.adapters.disk import load_adapter
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.commands import DTYPES, add_load_in, parser
from rosa.evaluation.generation import answer
from rosa.storage.files import replace_text
from rosa.training.data import load_rows, prompt
from rosa.training.methods import load_trained


def run(argv: list[str]) -> None:
    """Run `rosa generate ...`."""
    options = parser("generate", "Answer an instruction, continue a prompt, or answer a file of rows, greedily.")
    options.add_argument("--model", required=True, help="folder or Hub name of the base model")
    adapter = options.add_mutually_exclusive_group()
    adapter.add_argument("--adapter", help="RoSA's or peft's, a folder or Hub name; the bare model if not given")
    adapter.add_argument(
        "--adapters",
        type=_named,
        default={},
        help="for --data: folders or Hub names with commas between, each called by its last part, or by NAME=FOLDER",
    )
    text = options.add_mutually_exclusive_group(required=True)
    text.add_argument("--instruction", help="the task, wrapped in the prompt of training")
    text.add_argument("--prompt", help="the text to continue, verbatim")
    text.add_argument(
        "--data",
        help="a .json or .jsonl file of rows with `instruction`, perhaps `input`, and in `adapter` the name of one of "
        "--adapters; the bare model's row without",
    )
    options.add_argument("--input", default="", help="further context for --instruction")
    options.add_argument("--output", type=Path, help="file for the rows of --data with their answers; default: stdout")
    options.add_argument("--batch-size", "--batch_size", type=int, default=8, help="of --data; default: %(default)s")
    options.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=256, help="default: %(default)s")
    options.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the model; default: as it was saved")
    add_load_in(options)
    args = options.parse_args(argv)
    if args.input and args.instruction is None:
        options.error("argument --input: only allowed with argument --instruction")
    if (args.adapters or args.output is not None) and args.data is None:
        options.error(f"argument --{'adapters' if args.adapters else 'output'}: only allowed with argument --data")

    rows = [] if args.data is None else _rows(args.data, args.adapters)
    if args.output is not None and args.output.exists():
        raise ValueError(f"--output {args.output} is there already: choose another file")
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.dtype, load_in=args.load_in)
    if args.adapter is not None:
        model = load_trained(model, args.adapter)
    for name, source in args.adapters.items():
        load_adapter(model, source, name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.data is None:
        text = prompt(args.instruction, args.input) if args.prompt is None else args.prompt
        print(answer(model, tokenizer, [text], max_new_tokens=args.max_new_tokens)[0])
        return
    predictions = answer(
        model,
        tokenizer,
        [prompt(row["instruction"], row["input"]) for row in rows],
        adapters=[row.get("adapter") for row in rows] if args.adapters else None,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    lines = [json.dumps({**row, "prediction": text}) for row, text in zip(rows, predictions, strict=True)]
    if args.output is None:
        print("\n".join(lines))
    else:
        replace_text(args.output, "\n".join(lines) + "\n")


def _named(text: str) -> dict[str, str]:
    """The sources of adapters by their names."""
    named: dict[str, str] = {}
    for part in text.split(","):
        name, is_named, source = part.strip().rpartition("=")
        name = name if is_named else Path(source).name
        if not name or not source:
            raise argparse.ArgumentTypeError(f"must be folders or Hub names, or NAME=FOLDER, got {part!r}")
        if name in named:
            raise argparse.ArgumentTypeError(f"{named[name]} and {source} are both called {name}: use NAME=FOLDER")
        named[name] = source
    return named


def _rows(data: str, adapters: dict[str, str]) -> list[dict]:
    """Rows to answer, each with an adapter that there is."""
    rows = load_rows(data, target=None)
    for index, row in enumerate(rows):
        name = row.get("adapter")
        if name is not None and (not isinstance(name, str) or name not in adapters):
            known = ", ".join(adapters) or "none: name them with --adapters"
            raise ValueError(f"{data}, row {index}: `adapter` is {name!r}, known are {known}")
    return rows
