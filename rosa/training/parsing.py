"""Reads what `rosa train` is given, from a YAML file and from the command line, and refuses what makes no sense."""

from __future__ import annotations

import math
import warnings
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentError, Namespace
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from rosa.adapters.card import PAPERS
from rosa.storage.settings import as_arguments, check_keys, load_settings
from rosa.training.finetune_arguments import (
    DEFAULTS_OF,
    TRAINING_DEFAULTS,
    FinetuneArguments,
    unread_options,
)
from rosa.training.methods import OURS, ROSA
from rosa.training.selecting import ADALORA_SELECTS

# Options of which a run could make nothing, or nothing but nan.
_ABOVE_ZERO = (
    "max_length", "learning_rate", "norm_learning_rate", "num_train_epochs", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "adam_epsilon",
)  # fmt: skip
_FROM_ZERO = (
    "weight_decay", "max_grad_norm", "warmup_steps", "eval_steps", "val_size", "dataloader_num_workers",
    "dls_warmup_steps",
)  # fmt: skip
_SHARES = {  # and whether they may be 0, and 1
    "dls_k_ratio": (False, True), "dls_p_exploit": (True, True), "adam_beta1": (True, False),
    "adam_beta2": (True, False),
}  # fmt: skip

# What other training commands call an option of this one.
_ELSEWHERE = {
    "batch_size": "per_device_train_batch_size", "cutoff_len": "max_length", "dataset": "data", "dataset_name": "data",
    "dataset_path": "data", "epochs": "num_train_epochs", "finetuning_type": "method", "lr": "learning_rate",
    "max_seq_length": "max_length", "model_name_or_path": "model", "packing": "padding_free", "peft_type": "method",
    "train_file": "data", "warmup_ratio": "warmup_steps",
}  # fmt: skip


class _Parser(HfArgumentParser):
    """Raises where argparse would end the process: the arguments may be another file's."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(None, message + self._meant(message))

    def _meant(self, message: str) -> str:
        """The options that unknown ones are likely to stand for, in words."""
        if not message.startswith("unrecognized arguments"):
            return ""
        words = [word.partition("=")[0].lstrip("-").replace("-", "_") for word in message.split() if word[:2] == "--"]
        names = [action.option_strings[0].lstrip("-") for action in self._actions]
        near = [_ELSEWHERE.get(word) or next(iter(get_close_matches(word, names, 1, 0.75)), None) for word in words]
        found = [f"--{name}" + " (below 1 it is a share)" * (name == "warmup_steps") for name in near if name]
        return f"; did you mean {', '.join(found)}?" if found else ""


class _Help(ArgumentDefaultsHelpFormatter):
    """Each option once, and its default, where it has one that the text does not say."""

    def _get_help_string(self, action: Action) -> str | None:
        told = action.default is None or action.nargs == 0 or "default: " in (action.help or "")
        return action.help if told else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = "" if action.nargs == 0 else self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {values}".rstrip()


def parse(argv: list[str]) -> tuple[FinetuneArguments, TrainingArguments]:
    """Read the arguments of `rosa train`.

    Args:
        argv (list of str): the command line. `--config FILE` names a YAML file of the same options, which those on the
            command line override: with another method there, what the file says to its own alone does not count.

    Returns:
        tuple: what RoSA takes, and what transformers takes.

    Raises:
        FileNotFoundError: there is no such file.
        argparse.ArgumentError, ValueError: an unknown option, one that is missing or that the method does not read, or
            a value of the wrong kind.
        SystemExit: `--help` was asked for.
    """
    parser = _parser()
    config = _Parser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path)
    found, rest = config.parse_known_args(argv)
    settings = {} if found.config is None else _from_file(found.config)
    given = vars(parser.parse_args(as_arguments(settings) + rest))
    parser.set_defaults(**DEFAULTS_OF.get(given["method"], {}))
    # A file may serve other methods than its own: what it says to that one alone is not for this one.
    of_its_own = unread_options(given["method"], given["dls"]) - unread_options(
        settings.get("method", ROSA), settings.get("dls")
    )
    left_out = sorted(settings.keys() & of_its_own)
    if left_out:
        warnings.warn(
            f"{found.config} says {', '.join(left_out)} to its own method alone, not to {given['method']}", stacklevel=2
        )
    words = as_arguments({name: value for name, value in settings.items() if name not in left_out}) + rest
    given = vars(parser.parse_args(words))
    _check_together(parser, given)
    _check_read(parser, words, given)
    _check_range(given)
    del given["config"]  # read above
    given["use_cpu"] |= bool(given["bf16"]) and not torch.accelerator.is_available()  # or transformers asks for it
    return parser.parse_dict(given | _automatic(given))


def option_names() -> set[str]:
    """The names of all options, as YAML files use them."""
    return {action.option_strings[0].removeprefix("--") for action in _parser()._actions}


def _check_together(parser: HfArgumentParser, given: dict) -> None:
    """Refuses options that exclude each other, or of which one is missing."""
    if given["output_dir"] is None and not given["dry_run"]:
        parser.error("the following arguments are required: --output")
    if given["resume_from_checkpoint"] is not None:
        parser.error("--resume takes the place of --resume_from_checkpoint")
    if given["save_only_model"] and given["resume"]:
        parser.error("--resume needs what --save_only_model leaves out of checkpoints: leave out one of the two")
    if given["streaming"] and given["max_steps"] <= 0:
        parser.error("--streaming needs --max_steps: how many rows there are is not known before they are read")
    if given["streaming"] and given["train_sampling_strategy"] != "random":
        parser.error(
            "--streaming takes rows as they come, and --train_sampling_strategy needs all of them: leave out one"
        )
    if given["streaming"] and 0 < given["val_size"] < 1:
        parser.error("--streaming holds out the first rows, of which --val_size is to say how many")
    if given["eval_strategy"] not in (None, "no") and not given["val_size"]:
        parser.error(f"--eval_strategy {given['eval_strategy']} needs rows that are held out: give --val_size")
    if given["metric_for_best_model"] not in (None, "loss", "eval_loss"):
        parser.error(
            "--metric_for_best_model must be loss: of the rows that are held out nothing else is measured, got "
            f"{given['metric_for_best_model']}"
        )
    if given["method"] == "adalora" and given["dls"]:
        parser.error(f"{ADALORA_SELECTS}: leave out --dls true, or take another --method")
    if given["norm_learning_rate"] is not None and given["method"] in OURS and not given["train_norms"]:
        parser.error("--norm_learning_rate is that of norms which train: give --train_norms true, or leave it out")


def _check_read(parser: HfArgumentParser, words: list[str], given: dict) -> None:
    """Refuses what was given to no effect, its default too."""
    nothing = parser.parse_args(words, Namespace(**dict.fromkeys(given)))  # which keeps argparse from its defaults
    unread = [n for n in unread_options(given["method"], given["dls"]) if getattr(nothing, n) is not None]
    of_selection = sorted(name for name in unread if name.startswith("dls_"))
    if of_selection:
        parser.error(f"layer selection is off, and nothing else reads {', '.join(of_selection)}: give --dls true too")
    if "peft" in unread:
        title = PAPERS[given["method"]].title
        parser.error(f"--peft holds the settings of a baseline, and the method is {title}: give --method too")
    if unread:
        in_peft = "" if given["method"] in OURS else ", whose settings stand in --peft, such as --peft '{\"r\": 4}'"
        parser.error(f"{_with_owners(unread)}, and the method is {given['method']}{in_peft}")


def _with_owners(names: Iterable[str]) -> str:
    """Options, and whose they are, in words."""
    by_owners: dict[str, list[str]] = {}
    for name in sorted(names):
        owners = [f"{PAPERS[own].title}'s" for own, config in OURS.items() if name in {f.name for f in fields(config)}]
        by_owners.setdefault(" and ".join(owners), []).append(name)
    return ", ".join(f"{', '.join(group)}: {owners} alone" for owners, group in by_owners.items())


def _check_range(given: dict) -> None:
    for name in (*_ABOVE_ZERO, *_FROM_ZERO):
        value, least = given[name], "above 0" if name in _ABOVE_ZERO else "from 0"
        if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and name in _FROM_ZERO))):
            raise ValueError(f"{name} must be a number {least}, got {value}")
    for name, (zero, one) in _SHARES.items():
        value = given[name]
        if not (0 < value < 1 or (value == 0 and zero) or (value == 1 and one)):
            raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value}")
    if given["dls_interval"] < 1:
        raise ValueError(f"dls_interval must be at least 1 step, got {given['dls_interval']}")
    if given["val_size"] >= 1 and given["val_size"] % 1:
        raise ValueError(f"val_size must be a whole number of rows, or a share below 1, got {given['val_size']}")
    if given["save_total_limit"] is not None and given["save_total_limit"] < 1:
        raise ValueError(f"save_total_limit must be at least 1, got {given['save_total_limit']}")
    if given["max_steps"] == 0:
        raise ValueError("max_steps must be above 0, or -1 for num_train_epochs to count, got 0")


def _parser() -> HfArgumentParser:
    parser = _Parser(
        [FinetuneArguments, TrainingArguments],
        prog="rosa train",
        usage="rosa train [--config FILE] --model MODEL --data DATA --output FOLDER [options]",
        description="Fine-tune a model with RoSA, RoAd or a method of peft's. Takes every field of transformers' "
        "TrainingArguments too.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"the same as --{action.dest} false"
    parser.add_argument("--config", type=Path, help="YAML file of these options; those on the command line count more")
    parser.add_argument("--output", dest="output_dir", help="folder for the adapter, the tokenizer and the checkpoints")
    # None: decided below, by what else was given.
    automatic = ("output_dir", "bf16", "dataloader_pin_memory", "eval_strategy", "include_num_input_tokens_seen")
    parser.set_defaults(**TRAINING_DEFAULTS, **dict.fromkeys(automatic))
    # In --help our own options stand before the hundred of transformers.
    parser._action_groups.sort(key=lambda group: group.title != FinetuneArguments._argument_group_name)
    return parser


def _from_file(file: Path) -> dict[str, Any]:
    settings = load_settings(file)
    check_keys(settings, option_names() - {"config", "help"}, str(file))
    return settings


def _automatic(given: dict) -> dict:
    """The training arguments that were left open, by what was given and what is there."""
    gpu = torch.cuda.is_available() and not given["use_cpu"]
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    choices = {
        "bf16": has_bf16 and not given["fp16"],
        "dataloader_pin_memory": gpu,
        "eval_strategy": "epoch" if given["val_size"] else "no",
        # Trainer then logs tokens per second. (HfArgumentParser takes this field for a boolean.) Where no mask tells it
        # what is padding, it would take the end of a row for it if the tokenizer has no token of its own for padding.
        "include_num_input_tokens_seen": "all" if given["padding_free"] else "non_padding",
    }
    return {name: value for name, value in choices.items() if given[name] is None}
