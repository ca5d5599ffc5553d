"""`rosa generate`: answer one instruction, or continue one prompt."""

from __future__ import annotations

import torch

from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.commands import DTYPES, parser
from rosa.evaluation.generation import answer
from rosa.training.data import prompt
from rosa.training.methods import load_trained


def run(argv: list[str]) -> None:
    """Run `rosa generate ...`."""
    options = parser("generate", "Answer an instruction, or continue a prompt, greedily.")
    options.add_argument("--model", required=True, help="folder or Hub name of the base model")
    options.add_argument("--adapter", help="RoSA's or peft's, a folder or Hub name; the bare model if not given")
    text = options.add_mutually_exclusive_group(required=True)
    text.add_argument("--instruction", help="the task, wrapped in the prompt of training")
    text.add_argument("--prompt", help="the text to continue, verbatim")
    options.add_argument("--input", default="", help="further context for --instruction")
    options.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=256, help="default: %(default)s")
    options.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the model; default: as it was saved")
    args = options.parse_args(argv)
    if args.input and args.prompt is not None:
        options.error("argument --input: not allowed with argument --prompt")

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.dtype)
    if args.adapter is not None:
        model = load_trained(model, args.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    text = prompt(args.instruction, args.input) if args.prompt is None else args.prompt
    print(answer(model, tokenizer, [text], max_new_tokens=args.max_new_tokens)[0])
