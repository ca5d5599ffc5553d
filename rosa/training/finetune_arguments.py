"""What `rosa train` takes: options of RoSA, RoAd and transformers, from a YAML file and from the command line."""

from __future__ import annotations

import json
import math
import warnings
from argparse import ArgumentError, Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from rosa.adapters.card import PAPERS
from rosa.adapters.config import ADAPTER_DTYPES, VARIANTS, AdapterConfig, RoadConfig, RosaConfig
from rosa.data.forms import DATA_FORMS
from rosa.models.quantizing import LOAD_IN
from rosa.selection.scored_layers import SCORES
from rosa.storage.settings import as_arguments, check_keys, load_settings, mapping
from rosa.training.methods import METHODS, OURS, ROAD, ROSA
from rosa.training.selecting import default_score, selects

# Where they differ from those of TrainingArguments: the paper's, and those of the command line.
TRAINING_DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 10.0,
    "report_to": "none",
}

# Where a method's differ from these: its own paper's. How many rows a step has and how many epochs there are is of the
# data and the machine, and stays.
DEFAULTS_OF = {
    ROAD: {
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "train_norms": RoadConfig.train_norms,
    },
}

# Options of which a run could make nothing, or nothing but nan.
_ABOVE_ZERO = (
    "max_length", "learning_rate", "norm_learning_rate", "num_train_epochs", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "adam_epsilon",
)  # fmt: skip
_FROM_ZERO = ("weight_decay", "max_grad_norm", "warmup_steps", "eval_steps", "val_size")


def _option(default: object, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class FinetuneArguments:
    """What `rosa train` takes beside transformers' TrainingArguments: among it the fields of RosaConfig and RoadConfig,
    by their names."""

    _argument_group_name = "RoSA"

    model: str = field(metadata={"help": "folder or Hub name of the base model"})
    data: str = field(
        metadata={
            "help": ".json, .jsonl, .csv or .parquet file, a folder of such files, or a dataset's name on the hub"
        }
    )
    data_format: Literal[DATA_FORMS] | None = _option(None, "what the rows are; default: found out by their columns")
    data_split: str | None = _option(None, "split of a dataset of the hub; default: train")
    data_config: str | None = _option(None, "configuration of a dataset of the hub")
    data_revision: str | None = _option(None, "branch, tag or commit of a dataset of the hub")
    streaming: bool = _option(False, "read the rows as they are needed instead of all of them first; needs --max_steps")
    dry_run: bool = _option(False, "show what would be learnt and the memory that takes, and do not train")
    val_size: int = _option(0, "rows held out for evaluation (paper: 300)")
    max_length: int = _option(2048, "tokens after which a row is cut off")
    method: Literal[METHODS] = _option(
        ROSA, "RoSA, RoAd (with its own paper's learning rate and schedule), or a baseline of peft's with the paper's"
    )
    peft: str | None = _option(None, "JSON: settings of the baseline other than the paper's, as peft names them")
    train_on_prompt: bool = _option(False, "learn the prompt too, not the response alone")
    response_logits: bool = _option(True, "compute logits where a label is to be predicted, and nowhere else")
    padding_free: bool = _option(False, "put the rows of a batch one behind another instead of padding them")
    attn_implementation: str | None = _option(
        None, "attention back end by transformers' name, such as flash_attention_2; default: transformers' choice"
    )
    load_in: Literal[LOAD_IN] | None = _option(None, "quantize the base while it is loaded; default: as it was saved")
    resume: bool = _option(False, "continue from the last complete checkpoint of --output, if there is one")
    overwrite: bool = _option(False, "replace the adapter and the checkpoints in --output")

    r_low: float = _option(RosaConfig.r_low, "share of the rotary pairs that is enhanced, from the lowest frequency")
    alpha: float = _option(RosaConfig.alpha, "strength of the enhancement")
    rank: int = _option(RosaConfig.rank, "inner size of the low-rank projections")
    variant: Literal[VARIANTS] = _option(
        RoadConfig.variant, "of RoAd: an angle and a scale a pair of outputs (1), a row (2), or two a row (4)"
    )
    targets: list[str] = field(
        default_factory=lambda: [RoadConfig.targets],
        metadata={"help": "of RoAd: all-linear, or the ends of the linear layers' names, such as q_proj v_proj"},
    )
    pairing: str = _option(RoadConfig.pairing, "of RoAd: neighbours, half, rope, or peft's group size")
    train_norms: bool = _option(RosaConfig.train_norms, "train the norms of the adapted layers; of RoAd false")
    norm_learning_rate: float | None = _option(None, "learning rate of the norms; default: --learning_rate")
    layers: list[int] | None = field(default=None, metadata={"help": "indices of the decoder layers to adapt, from 0"})
    adapter_dtype: Literal[ADAPTER_DTYPES] = _option(RosaConfig.adapter_dtype, "dtype of the adapter's parameters")

    dls: bool | None = _option(None, "Dynamic Layer Selection; default: true for RoSA, false for all others")
    dls_k_ratio: float = _option(0.5, "share of the layers that is selected")
    dls_interval: int = _option(40, "steps from one selection to the next")
    dls_warmup_steps: int = _option(0, "steps before the first selection")
    dls_p_exploit: float = _option(0.8, "probability of taking the best layers instead of random ones")
    dls_mode: Literal["skip", "mask"] = _option("skip", "freeze the other layers, or drop their gradients")
    dls_score: Literal[SCORES] | None = _option(
        None, "whose gradients rank the layers; default: the norms', or the adapter's of RoAd whose norms do not train"
    )
    dls_seed: int | None = _option(None, "seed of the selection; default: --seed")

    @property
    def config(self) -> AdapterConfig | None:
        """The configuration of RoSA or of RoAd; None for a baseline.

        Raises:
            TypeError, ValueError: a field of it is out of its range.
        """
        if self.method not in OURS:
            return None
        given = vars(self) | {
            "targets": RoadConfig.targets if self.targets == [RoadConfig.targets] else self.targets,
            "pairing": int(self.pairing) if self.pairing.isdecimal() else self.pairing,
        }
        return OURS[self.method](**{f.name: given[f.name] for f in fields(OURS[self.method])})

    @property
    def peft_settings(self) -> dict[str, object]:
        """What `peft` says.

        Raises:
            ValueError: it is no JSON object.
        """
        try:
            return mapping(json.loads(self.peft or "{}"), "--peft")
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"--peft must be JSON, such as '{{\"r\": 8}}', got {self.peft}: {error}") from error

    def layer_selection(self, seed: int) -> dict[str, object] | None:
        """The keyword arguments of the layer selection in a run with this seed; None for no selection."""
        if not _selects(self.method, self.dls):
            return None
        given = {name.removeprefix("dls_"): value for name, value in vars(self).items() if name.startswith("dls_")}
        return given | {
            "seed": seed if self.dls_seed is None else self.dls_seed,
            "score": default_score(self.config) if self.dls_score is None else self.dls_score,
        }

    def settings(self, seed: int) -> dict[str, object]:
        """Every option that a run with this seed reads, by name, as its checkpoints know it."""
        unread, selection = unread_options(self.method, self.dls), self.layer_selection(seed)
        read = {n: value for n, value in vars(self).items() if n not in unread and not n.startswith("dls")}
        of_selection = {f"dls_{name}": value for name, value in (selection or {}).items()}
        return read | {"peft": self.peft_settings, "dls": selection is not None} | of_selection


class _Parser(HfArgumentParser):
    """Raises where argparse would end the process: the arguments may be another file's."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(None, message)


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
    _check_read(parser, words, given)
    _check_range(given)
    del given["config"]  # read above
    given["use_cpu"] |= bool(given["bf16"]) and not torch.accelerator.is_available()  # or transformers asks for it
    return parser.parse_dict(given | _automatic(given))


def option_names() -> set[str]:
    """The names of all options, as YAML files use them."""
    return {action.option_strings[0].removeprefix("--") for action in _parser()._actions}


def unread_options(method: str, dls: bool | None) -> set[str]:
    """The names of the options that nothing reads in a run.

    Args:
        method (str): one of METHODS.
        dls (bool or None): as the option of this name.
    """
    own = {name: {f.name for f in fields(config)} for name, config in OURS.items()}
    of_others = {"peft"}.union(*own.values()) - own.get(method, {"peft"})
    of_selection = {f.name for f in fields(FinetuneArguments) if f.name.startswith("dls_")}
    return of_others if _selects(method, dls) else of_others | of_selection


def _selects(method: str, dls: bool | None) -> bool:
    return selects(method) if dls is None else dls


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
    )
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
