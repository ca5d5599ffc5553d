"""`rosa generate`: answer one instruction, continue one prompt, or answer a file of rows, each with its own adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rosa.commands import check_counts, check_texts, parser
from rosa.commands.adapters import ALONE, Chosen, add_model_options, choose, load
from rosa.data.prompt_form import CHAT, PLAIN
from rosa.evaluation.generation import answer
from rosa.evaluation.questions import check_form, form_of, is_verbatim, load_questions, question
from rosa.storage.files import replace_text
from rosa.storage.output import check_output


def run(argv: list[str]) -> None:
    """Run `rosa generate ...`."""
    options = parser("generate", "Answer an instruction, continue a prompt, or answer a file of rows, greedily.")
    add_model_options(options, several="for --data")
    text = options.add_mutually_exclusive_group(required=True)
    text.add_argument("--instruction", help="the task, asked as the adapter's training rows were; see --data")
    text.add_argument("--prompt", help="the text to continue, verbatim")
    text.add_argument(
        "--data",
        help="rows to answer, a .json, .jsonl, .csv or .parquet file, a folder of them or a dataset's name: with "
        "`instruction` and perhaps `input`, or `messages` or `conversations`, of which a last answer is asked for "
        "again, or `prompt`; `adapter` names one of --adapters (the bare model's row without). Or a .txt file with a "
        "question a line. All are asked as the adapter's training rows were: in the paper's prompt, by the chat "
        "template, or plain; but a `prompt` is continued verbatim, and so is a line without an adapter",
    )
    options.add_argument("--input", default="", help="further context for --instruction")
    options.add_argument("--output", type=Path, help="file for the rows of --data with their answers; default: stdout")
    options.add_argument("--batch-size", "--batch_size", type=int, default=8, help="of --data; default: %(default)s")
    options.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=256, help="default: %(default)s")
    args = options.parse_args(argv)
    if args.input and args.instruction is None:
        options.error("argument --input: only allowed with argument --instruction")
    if (args.adapters or args.output is not None) and args.data is None:
        options.error(f"argument --{'adapters' if args.adapters else 'output'}: only allowed with argument --data")

    check_counts(options, args, "max_new_tokens", "batch_size")
    check_texts(options, args, "instruction", "input", "prompt")
    chosen = choose(options, args)
    if args.data is not None:
        rows = _rows(args.data, chosen)
    elif args.instruction is not None:
        rows = [{"instruction": args.instruction, "input": args.input}]
    else:
        rows = [{"prompt": args.prompt}]
    if args.output is not None:
        if args.output.exists():
            raise ValueError(f"--output {args.output} is there already: choose another file")
        check_output(args.output.parent, args.output)
    model, tokenizer = load(chosen, args.dtype, args.load_in)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)  # before the work of answering
    forms = {form_of(row, chosen.forms.get(_adapter(row, chosen))) for row in rows}
    predictions = answer(
        model,
        tokenizer,
        [question(row, chosen.forms.get(_adapter(row, chosen)), tokenizer) for row in rows],
        form=CHAT if CHAT in forms else PLAIN,
        adapters=[row.get("adapter") for row in rows] if args.adapters else None,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    if args.data is None:
        print(predictions[0])
        return
    lines = [json.dumps({**row, "prediction": text}, default=str) for row, text in zip(rows, predictions, strict=True)]
    if args.output is None:
        print("\n".join(lines))
    else:
        replace_text(args.output, "\n".join(lines) + "\n")


def _rows(data: str, chosen: Chosen) -> list[dict]:
    """Rows to answer, each with an adapter that there is and can be asked it."""
    rows = load_questions(data, chosen.form)
    for row in rows:
        if row.get("adapter") == "":  # as a table has it that has no other way to name none
            row["adapter"] = None
    named = [name for name in chosen.folders if name != ALONE]
    for index, row in enumerate(rows):
        name = row.get("adapter")
        if name is not None and (not isinstance(name, str) or name not in named):
            known = ", ".join(named) or "none: name them with --adapters"
            raise ValueError(f"{data}, row {index}: `adapter` is {name!r}, known are {known}")
        check_form(row, chosen.forms.get(_adapter(row, chosen)), f"{data}, row {index}")
    if any(is_verbatim(row) and chosen.forms.get(_adapter(row, chosen)) == CHAT for row in rows):
        print(
            "prompts are continued as they are; this adapter was trained on conversations: give `messages`, or "
            "`instruction`",
            file=sys.stderr,
        )
    return rows


def _adapter(row: dict, chosen: Chosen) -> str | None:
    """The name of a row's adapter; None for the bare model."""
    return ALONE if ALONE in chosen.folders else row.get("adapter")
