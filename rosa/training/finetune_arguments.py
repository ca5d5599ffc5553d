"""What `rosa train` takes: options of RoSA, RoAd and transformers, from a YAML file and from the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Literal

from rosa.adapters.config import ADAPTER_DTYPES, VARIANTS, AdapterConfig, RoadConfig, RosaConfig
from rosa.data.forms import DATA_FORMS
from rosa.models.quantizing import LOAD_IN
from rosa.selection.scored_layers import SCORES
from rosa.storage.settings import mapping
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
    val_size: float = _option(0, "rows held out for evaluation, or below 1 the share of them (paper: 300)")
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

    def __post_init__(self) -> None:
        if self.val_size >= 1:
            self.val_size = int(self.val_size)

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
