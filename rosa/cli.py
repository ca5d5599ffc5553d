"""The command `rosa`. Each sub-command parses its own arguments and imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def main(argv: list[str] | None = None) -> None:
    """Run `rosa COMMAND ...`.

    Args:
        argv (list of str, optional): the arguments; None takes the process's own.

    Raises:
        SystemExit: 2 for wrong arguments, 1 for an error of the user's data, model or files, told in one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("rosa", description="RoPE-aware Selective Adaptation of language models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    # The command's name alone: its arguments are its own.
    command = parser.parse_args(argv[:1]).command
    try:
        COMMANDS[command][0](argv[1:])
    except ModuleNotFoundError as error:
        print(f"rosa {command}: error: {error}; install the extra: pip install 'rosa-peft[train]'", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"rosa {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _train(argv: list[str]) -> None:
    from transformers import HfArgumentParser, TrainingArguments

    from rosa.finetune import TRAINING_DEFAULTS, FinetuneArguments, finetune

    parser = HfArgumentParser(
        [FinetuneArguments, TrainingArguments],
        prog="rosa train",
        usage="rosa train --model MODEL --data DATA --output FOLDER [options]",
        description="Fine-tune a model with RoSA. Takes every field of transformers' TrainingArguments too.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", dest="output_dir", help="folder for the adapter, the tokenizer and the checkpoints")
    # None: decided below, by what else was given.
    automatic = ("output_dir", "bf16", "dataloader_pin_memory", "eval_strategy", "include_num_input_tokens_seen")
    parser.set_defaults(**TRAINING_DEFAULTS, **dict.fromkeys(automatic))
    given = vars(parser.parse_args(argv))
    if given["output_dir"] is None:
        parser.error("the following arguments are required: --output")
    if given["resume_from_checkpoint"] is not None:
        parser.error("--resume takes the place of --resume_from_checkpoint")
    finetune(*parser.parse_dict(given | _automatic(given)))


def _automatic(given: dict) -> dict:
    """The training arguments that were left open, by what was given and what is there."""
    import torch

    gpu = torch.cuda.is_available() and not given["use_cpu"]
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    choices = {
        "bf16": has_bf16 and not given["fp16"],
        "dataloader_pin_memory": gpu,
        "eval_strategy": "epoch" if given["val_size"] else "no",
        # Trainer then logs tokens per second. (HfArgumentParser takes this field for a boolean.)
        "include_num_input_tokens_seen": "non_padding",
    }
    return {name: value for name, value in choices.items() if given[name] is None}


def _generate(argv: list[str]) -> None:
    parser = _parser("generate", "Answer an instruction, or continue a prompt, greedily.")
    parser.add_argument("--model", required=True, help="folder or Hub name of the base model")
    parser.add_argument("--adapter", help="folder of a RoSA adapter; the bare model if not given")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--instruction", help="the task, wrapped in the prompt of training")
    text.add_argument("--prompt", help="the text to continue, verbatim")
    parser.add_argument("--input", default="", help="further context for --instruction")
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the model; default: as it was saved")
    args = parser.parse_args(argv)
    if args.input and args.prompt is not None:
        parser.error("argument --input: not allowed with argument --prompt")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rosa.adapter import load_adapter
    from rosa.data import prompt
    from rosa.generation import answer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    if args.adapter is not None:
        load_adapter(model, args.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    text = prompt(args.instruction, args.input) if args.prompt is None else args.prompt
    print(answer(model, tokenizer, [text], max_new_tokens=args.max_new_tokens)[0])


def _demo(argv: list[str]) -> None:
    parser = _parser("demo", "Train a small model end to end and report what it learnt.")
    parser.add_argument("--output", default="demo_output", help="folder for the results; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)

    from rosa.demo.run import run

    run(Path(args.output), args.seed)


def _kernels(argv: list[str]) -> None:
    parser = _parser("kernels", "Compile the kernels for GPUs that need not be there, and show registers and traffic.")
    parser.add_argument("--arch", nargs="+", help="default: sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942")
    args = parser.parse_args(argv)

    from rosa_kernels.offline import CARDS, main

    main(args.arch or list(CARDS))


def _info(argv: list[str]) -> None:
    _parser("info", "Show versions, GPUs and kernel backends.").parse_args(argv)

    import platform
    from importlib.metadata import PackageNotFoundError, version

    import rosa
    import rosa_kernels

    print(f"rosa          {rosa.__version__}")
    print(f"Python        {platform.python_version()}")
    for package in PACKAGES:
        try:
            print(f"{package:13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:13} not installed")
    for gpu in _gpus():
        print(f"GPU           {gpu}")
    print(f"backends      {', '.join(rosa_kernels.available_backends())}")
    for variable in ("ROSA_BACKEND", "TRITON_INTERPRET"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")


def _gpus() -> list[str]:
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{c.name}, {c.total_memory / 2**30:.0f} GiB, sm_{c.major}{c.minor}" for c in cards] or ["no GPU"]


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(f"rosa {command}", description=description, allow_abbrev=False)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (_train, "fine-tune a model with RoSA"),
    "generate": (_generate, "answer an instruction with a model and an adapter"),
    "demo": (_demo, "train a small model end to end"),
    "kernels": (_kernels, "compile the kernels for a choice of GPUs and show their figures"),
    "info": (_info, "show versions, GPUs and kernel backends"),
}
