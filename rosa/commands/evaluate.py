"""`rosa evaluate`: a model's accuracy on benchmarks and on tasks of one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosa.adapter import local_folder, read_description
from rosa.commands import DTYPES, parser
from rosa.evaluation import evaluate, fingerprint
from rosa.methods import load_trained
from rosa.tasks import find_tasks, load_test_rows


def run(argv: list[str]) -> None:
    """Run `rosa evaluate ...`."""
    options = parser("evaluate", "Answer the test rows of tasks greedily, and report the accuracy.")
    options.add_argument("--model", required=True, help="folder or Hub name of the base model")
    options.add_argument(
        "--adapter", help="folder or Hub name of an adapter, RoSA's or peft's; the bare model if not given"
    )
    options.add_argument(
        "--tasks", required=True, help="commonsense, arithmetic, or names of tasks with commas between"
    )
    options.add_argument(
        "--data-dir",
        "--data_dir",
        type=Path,
        help="folder with NAME/test.json for each task, as in LLM-Adapters; the Hub's data sets if not given",
    )
    options.add_argument(
        "--output",
        type=Path,
        default=Path("evaluation"),
        help="folder for predictions and results.json; what is there is continued; default: %(default)s",
    )
    options.add_argument("--batch-size", "--batch_size", type=int, default=8, help="default: %(default)s")
    options.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=256, help="default: %(default)s")
    options.add_argument("--limit", type=int, help="only the first rows of each task; default: all")
    options.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the model; default: as it was saved")
    options.add_argument("--overwrite", action="store_true", help="discard earlier predictions for these tasks")
    args = options.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            options.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")

    tasks = {task: load_test_rows(task, args.data_dir)[: args.limit] for task in find_tasks(args.tasks, args.data_dir)}
    adapter = None if args.adapter is None else local_folder(args.adapter)
    made_with = {"model": _whole_name(args.model), "adapter": None if adapter is None else read_description(adapter)}
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is not a folder")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    if adapter is not None:
        model = load_trained(model, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = evaluate(
        model,
        tokenizer,
        tasks,
        args.output,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        made_with={**made_with, "weights": fingerprint(model)},
        overwrite=args.overwrite,
    )
    print(evaluation.table())
    settings = {"model": args.model, "adapter": args.adapter, "max_new_tokens": args.max_new_tokens}
    _write(args.output / "results.json", {**settings, **evaluation.to_dict()})


def _whole_name(model: str) -> str:
    """One name for a folder, however it was written."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _write(file: Path, results: dict) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)
