"""`rosa evaluate`: a model's accuracy on benchmarks and on tasks of one's own."""

from __future__ import annotations

import json
from pathlib import Path

from rosa.adapters.base import Base
from rosa.adapters.folder import refuse_model_folder
from rosa.commands import check_counts, parser
from rosa.commands.adapters import ALONE, add_model_options, choose, load
from rosa.data.prompt_form import INSTRUCTION
from rosa.evaluation.evaluate import check_earlier, evaluate, fingerprint
from rosa.evaluation.tasks import find_tasks, load_test_rows
from rosa.storage.digest import base_digest, digest
from rosa.storage.files import replace_text
from rosa.storage.output import check_output


def run(argv: list[str]) -> None:
    """Run `rosa evaluate ...`."""
    options = parser("evaluate", "Answer the test rows of tasks greedily, and report the accuracy.")
    add_model_options(options)
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
    options.add_argument("--overwrite", action="store_true", help="discard earlier predictions for these tasks")
    args = options.parse_args(argv)
    check_counts(options, args, "batch_size", "max_new_tokens", "limit")

    tasks = {task: load_test_rows(task, args.data_dir)[: args.limit] for task in find_tasks(args.tasks, args.data_dir)}
    chosen = choose(options, args)
    # What is not in the weights, such as alpha.
    adapter_config = digest(chosen.descriptions[ALONE]) if args.adapter is not None else None
    check_output(args.output)
    refuse_model_folder(args.output)
    made_with = {"model": _digest(chosen.base), "adapter": adapter_config}
    if made_with["model"] is not None and not args.overwrite:
        known = {**made_with, "load_in": args.load_in, "max_new_tokens": args.max_new_tokens}
        check_earlier(tasks, args.output, known)

    model, tokenizer = load(chosen, args.dtype, args.load_in)
    evaluation = evaluate(
        model,
        tokenizer,
        tasks,
        args.output,
        form=chosen.form or INSTRUCTION,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        made_with={
            **made_with,
            "weights": fingerprint(model),
            **({} if args.load_in is None else {"load_in": args.load_in}),  # of some quantized weights it sees no value
        },
        overwrite=args.overwrite,
    )
    print(evaluation.table())
    settings = {"model": chosen.base.name, "adapter": args.adapter, "max_new_tokens": args.max_new_tokens}
    replace_text(args.output / "results.json", json.dumps({**settings, **evaluation.to_dict()}, indent=2) + "\n")


def _digest(base: Base) -> str | None:
    """None where the base is not there: `load` says what is to be done."""
    try:
        return base_digest(*base)
    except (OSError, ValueError):
        return None
