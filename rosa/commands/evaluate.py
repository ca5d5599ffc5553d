"""`rosa evaluate`: a model's accuracy on benchmarks and on tasks of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rosa.adapters.folder import local_folder, read_description, refuse_model_folder
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.commands import DTYPES, add_load_in, parser
from rosa.evaluation.evaluate import evaluate, fingerprint
from rosa.evaluation.tasks import find_tasks, load_test_rows
from rosa.storage.digest import base_digest, digest
from rosa.storage.files import replace_text
from rosa.training.methods import load_trained


def run(argv: list[str]) -> None:
    """Run `rosa evaluate ...`."""
    options = parser("evaluate", "Answer the test rows of tasks greedily, and report the accuracy.")
    options.add_argument("--model", required=True, help="folder or Hub name of the base model")
    options.add_argument(
        "--adapter", help="folder or Hub name of an adapter, RoSA's, RoAd's or peft's; the bare model if not given"
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
    add_load_in(options)
    options.add_argument("--overwrite", action="store_true", help="discard earlier predictions for these tasks")
    args = options.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            options.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")

    tasks = {task: load_test_rows(task, args.data_dir)[: args.limit] for task in find_tasks(args.tasks, args.data_dir)}
    adapter = None if args.adapter is None else local_folder(args.adapter)
    # What is not in the weights, such as alpha.
    adapter_config = None if adapter is None else digest(read_description(adapter))
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is not a folder")
    refuse_model_folder(args.output)

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=args.dtype, load_in=args.load_in)
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
        made_with={
            "model": base_digest(args.model),
            "adapter": adapter_config,
            "weights": fingerprint(model),
            **({} if args.load_in is None else {"load_in": args.load_in}),  # of some quantized weights it sees no value
        },
        overwrite=args.overwrite,
    )
    print(evaluation.table())
    settings = {"model": args.model, "adapter": args.adapter, "max_new_tokens": args.max_new_tokens}
    replace_text(args.output / "results.json", json.dumps({**settings, **evaluation.to_dict()}, indent=2) + "\n")
