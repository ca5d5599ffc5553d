"""The command `rosa`. A sub-command is a file of `rosa.commands`, imported when it runs."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from importlib import import_module

import rosa

COMMANDS = {
    "train": "fine-tune a model with RoSA, RoAd or a method of peft's",
    "compare": "train and test several methods with several seeds, in one table",
    "chat": "talk to an adapter in the terminal",
    "generate": "answer an instruction, or a file of them, with an adapter",
    "evaluate": "measure accuracy on benchmarks and tasks of your own",
    "merge": "put an adapter into its base's weights, as a model that needs no RoSA",
    "push": "upload an adapter to the Hugging Face hub, with a model card",
    "inspect": "measure queries and keys by frequency, show a run's layer selection or a RoAd adapter's angles",
    "demo": "train a small model end to end",
    "kernels": "compile the kernels for a choice of GPUs and show their figures",
    "info": "show versions, GPUs and kernel backends",
}

OWN = ("rosa", "rosa_kernels")
EXTRAS = {
    "train": ("accelerate", "datasets", "peft", "matplotlib", "scipy"),
    "quant": ("bitsandbytes", "torchao"),
    "deepspeed": ("deepspeed",),
}

# What libraries say by their loggers while they are imported, and nobody who runs a command can do anything about.
NO_NEWS = {
    "torchao": "Failed to load ",  # its kernels for other GPUs
    "torch.utils._pytree": "%s is an Enum subclass",  # of torchao's
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU.",
}


def main(argv: list[str] | None = None) -> None:
    """Run `rosa COMMAND ...`.

    Args:
        argv (list of str, optional): the arguments; None takes the process's own.

    Raises:
        SystemExit: 2 for wrong arguments; 1 for an error of the user's data, model or files, told in one line; 130 for
            Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        "rosa", description="RoPE-aware Selective Adaptation and 2D rotary adaptation of language models."
    )
    parser.add_argument("--version", action="version", version=f"rosa {rosa.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    # The command's name alone: its arguments are its own.
    command = parser.parse_args(argv[:1]).command
    for logger, start in NO_NEWS.items():
        logging.getLogger(logger).addFilter(lambda record, start=start: not str(record.msg).startswith(start))
    try:
        import_module(f"rosa.commands.{command}").run(argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        told = _told(error, command)
        if told is None:  # a mistake of our own: its traceback is what helps
            raise
        text, status = told
        print(f"rosa {command}: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(status)


def _told(error: BaseException, command: str) -> tuple[str, int] | None:
    """What to tell a person of an error, in a line, and the exit status; None for errors that nobody meant to raise."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{f': {error}' if str(error) else ''}", 130
    if isinstance(error, argparse.ArgumentError):
        return f"error: {error}; see rosa {command} --help", 2
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in OWN:
        return f"error: {error}{_remedy(error)}", 1
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return f"error: {error}", 1
    return None


def _remedy(error: ImportError) -> str:
    """The extra with the package that is missing; transformers names it in the text alone."""
    if "in RoSA's folder" in str(error):
        return ""
    words = re.findall(r"\w+", f"{error.name} {error}")
    for extra, packages in EXTRAS.items():
        if any(package in words for package in packages):
            return f"; install the extra: pip install '.[{extra}]' in RoSA's folder"
    return ""
