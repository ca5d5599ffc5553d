"""The adapters that a command is to use, and their base: named on the command line, looked up, loaded."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rosa.adapters.base import Base, base_named_by, find_base
from rosa.adapters.disk import load_adapter
from rosa.adapters.folder import has_adapter, local_folder, model_in, read_description
from rosa.adapters.peft_road import PEFT_TYPE
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.commands import DTYPES, add_load_in
from rosa.data.prompt_form import read_form
from rosa.training.methods import load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALONE = ""  # the name of an adapter that is the only one


class Chosen(NamedTuple):
    """A base, and the adapters on it by name; nothing of them is loaded yet."""

    base: Base
    model: str | None  # as --model gave it
    folders: dict[str, Path]
    descriptions: dict[str, dict[str, Any]]
    forms: dict[str, str]  # of their prompts

    @property
    def form(self) -> str | None:
        """That of the only adapter's prompts; None for the bare model."""
        return self.forms.get(ALONE)


def add_model_options(options: argparse.ArgumentParser, *, several: str | None = None) -> None:
    """The options --model, --adapter, --dtype, --load-in and, where `several` says what for, --adapters."""
    options.add_argument("--model", help="folder or Hub name of the base; default: the one that the adapter names")
    group = options.add_mutually_exclusive_group()
    group.add_argument("--adapter", help="RoSA's, RoAd's or peft's, a folder or Hub name; the bare model if not given")
    if several:
        text = (
            f"{several}: RoSA's and RoAd's, folders or Hub names with commas between, each called by its last part, or "
            "by NAME=FOLDER"
        )
        group.add_argument("--adapters", type=_named, default={}, help=text)
    options.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the model; default: as it was saved")
    add_load_in(options)


def choose(options: argparse.ArgumentParser, args: argparse.Namespace) -> Chosen:
    """What the options of `add_model_options` ask for. Adapters on the hub are fetched.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: an adapter is damaged, or names no base and --model is not given.
        SystemExit: neither a model nor an adapter was given.
    """
    sources = getattr(args, "adapters", {}) or ({} if args.adapter is None else {ALONE: args.adapter})
    if args.model is None and not sources:
        options.error("one of the arguments --model --adapter is required")
    folders = {name: local_folder(source) for name, source in sources.items()}
    for folder in folders.values():
        if not has_adapter(folder) and model_in(folder) is not None:
            raise ValueError(f"{folder} holds a model ({model_in(folder)}) and no adapter: give it as --model")
    descriptions = {name: read_description(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        kind = descriptions[name].get("peft_type", PEFT_TYPE)
        if name != ALONE and kind != PEFT_TYPE:
            raise ValueError(
                f"{folder} holds an adapter of peft's, of type {kind!r}: several at once are RoSA's and RoAd's; give "
                "it alone, as --adapter"
            )
    base = find_base({folders[name]: descriptions[name] for name in folders}, args.model)
    return Chosen(base, args.model, folders, descriptions, {name: read_form(f) for name, f in folders.items()})


def load(chosen: Chosen, dtype: str, load_in: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base with the adapters, on the first GPU or on the CPU, and its tokenizer: an adapter's if one has it.

    Raises:
        FileNotFoundError, ValueError: the base is not there or damaged, or an adapter does not fit it.
    """
    folders = chosen.folders
    with base_named_by(folders.values(), chosen.model):
        tokenizer = load_tokenizer(chosen.base.name, revision=chosen.base.revision, beside=folders.values())
        model = load_model(chosen.base.name, dtype, load_in=load_in, revision=chosen.base.revision)
    if ALONE in folders:
        model = load_trained(model, folders[ALONE])
    else:
        for name, folder in folders.items():
            load_adapter(model, folder, name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _named(text: str) -> dict[str, str]:
    """The sources of adapters by their names."""
    named: dict[str, str] = {}
    for part in text.split(","):
        name, is_named, source = part.strip().partition("=")
        name, source = (name, source) if is_named else (Path(name).name, name)
        if not name or not source:
            raise argparse.ArgumentTypeError(f"must be folders or Hub names, or NAME=FOLDER, got {part!r}")
        if not re.fullmatch(r"[\w-]+", name):
            raise argparse.ArgumentTypeError(f"a name is letters, digits, '_' and '-', not {name!r}: use NAME=FOLDER")
        if name in named:
            raise argparse.ArgumentTypeError(f"{named[name]} and {source} are both called {name}: use NAME=FOLDER")
        named[name] = source
    return named
