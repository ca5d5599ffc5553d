"""The fine-tuning methods: RoSA and RoAd, and through peft those that RoSA is compared with.

The settings of the latter are those of the paper's text; what it does not name is peft's default. Where its tables
print another number of parameters, `configs/paper/methods.yaml` has the settings that give it.

peft is imported where a method of its own is used: it takes seconds, and loads whatever quantises.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from rosa.adapters import plan
from rosa.adapters.card import PAPERS
from rosa.adapters.config import AdapterConfig
from rosa.adapters.disk import load_adapter
from rosa.adapters.folder import PEFT_CONFIG_NAME, WEIGHTS_NAME, is_peft, local_folder, read_description
from rosa.adapters.parameters import count_parameters
from rosa.adapters.patching import patch
from rosa.adapters.peft_road import PEFT_TYPE as PEFT_ROAD
from rosa.adapters.record import is_patched
from rosa.models.decoder import decoder_layers
from rosa.storage.settings import check_keys

if TYPE_CHECKING:
    from transformers import TrainerCallback

ROSA, ROAD = "rosa", "road"
OURS = {name: method.config for name, method in plan.METHODS.items()}  # the configurations of our own


class Baseline(NamedTuple):
    """A method of peft's: the name of its configuration's class, and the paper's settings for it."""

    config: str
    settings: Mapping[str, Any]


_LINEARS = {"target_modules": "all-linear"}  # of the decoder: peft leaves out the output layer

BASELINES = {
    "lora": Baseline("LoraConfig", {"r": 16, "lora_alpha": 32, **_LINEARS}),
    "dora": Baseline("LoraConfig", {"r": 16, "lora_alpha": 32, "use_dora": True, **_LINEARS}),
    "adalora": Baseline("AdaLoraConfig", {"init_r": 32, "target_r": 16, **_LINEARS}),
    "boft": Baseline(
        "BOFTConfig",
        {
            "boft_block_size": 4,
            "boft_n_butterfly_factor": 2,
            "boft_dropout": 0.1,
            "target_modules": ["q_proj", "v_proj"],
        },
    ),
    "vera": Baseline("VeraConfig", {"r": 16, **_LINEARS}),
    "oft": Baseline("OFTConfig", _LINEARS),
    "c3a": Baseline("C3AConfig", {"block_size": 128, **_LINEARS}),
    # peft's BoneConfig of old, now MissConfig; both keep the variant Bat ("bat") for whoever asks for it.
    "bone": Baseline("MissConfig", {"r": 16, **_LINEARS}),
    "ln_tuning": Baseline("LNTuningConfig", {}),
}
METHODS = (*OURS, *BASELINES)


def attach(
    model: nn.Module, method: str, *, config: AdapterConfig | None = None, settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """Make a model trainable by one method, everything else of it frozen.

    Args:
        model (nn.Module): a causal language model; it may stand on the meta device.
        method (str): one of METHODS.
        config (RosaConfig or RoadConfig, optional): the settings of RoSA or of RoAd; None takes the defaults.
        settings (mapping, optional): arguments of a baseline's configuration in peft, in place of the paper's.

    Returns:
        nn.Module: the patched model itself, or peft's wrapper of it.

    Raises:
        ValueError: an unknown method or setting, settings of another method, or a method that does not fit the model.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: known are {', '.join(METHODS)}")
    if config is not None and type(config) is not OURS.get(method):
        raise ValueError(f"a {type(config).__name__} was given for the method {method}")
    if method in OURS:
        if settings:
            raise ValueError(f"settings of peft were given for {PAPERS[method].title}: {dict(settings)}")
        return patch(model, OURS[method]() if config is None else config)
    import peft

    from rosa.training.adalora import spare_evaluation
    from rosa.training.ln_tuning import widen_norms

    baseline = BASELINES[method]
    config_class = getattr(peft, baseline.config)
    check_keys(settings or {}, [field.name for field in fields(config_class)], f"settings of {method}")
    merged = {"task_type": "CAUSAL_LM", **baseline.settings, **(settings or {})}
    if method == "ln_tuning":
        merged.setdefault("target_modules", norm_names(model))
    if method == "adalora":
        merged.setdefault("total_step", 1)  # AllocateRanks sets it when training begins
    try:
        attached = peft.get_peft_model(model, config_class(**merged))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{method} does not fit {type(model).__name__} with {merged}: {error}") from error
    if method == "ln_tuning":
        widen_norms(attached)
    if method == "adalora":
        spare_evaluation(attached)
    return attached


def load_trained(model: nn.Module, source: str | os.PathLike) -> nn.Module:
    """Load an adapter into a model: RoSA's, RoAd's or one of peft's.

    Args:
        model (nn.Module): a model of the adapter's base.
        source (path or str): a folder, or a repository of the Hugging Face hub ("user/name").

    Returns:
        nn.Module: the model with the adapter; peft's is wrapped, but for RoAd's, which are ours then.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: the adapter is damaged or does not fit the model.
    """
    folder = local_folder(source)
    if not is_peft(folder) or read_description(folder).get("peft_type") == PEFT_ROAD:
        return load_adapter(model, folder)
    if "peft_type" not in read_description(folder):
        raise ValueError(f"{folder / PEFT_CONFIG_NAME} is damaged: it names no peft_type")
    import peft
    from safetensors.torch import load_file

    from rosa.training.adalora import spare_evaluation
    from rosa.training.ln_tuning import widen_norms

    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except Exception as error:  # peft checks little, and trips over what it finds
        raise ValueError(
            f"{folder / PEFT_CONFIG_NAME} is no configuration of this peft ({peft.__version__}): "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} is truncated or no safetensors file: {error}") from error
    try:
        loaded = peft.PeftModel.from_pretrained(model, folder, config=config)
    except Exception as error:
        raise ValueError(
            f"the adapter in {source} does not fit {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    if config.peft_type == "LN_TUNING":
        widen_norms(loaded)
        peft.set_peft_model_state_dict(loaded, load_file(folder / WEIGHTS_NAME))  # it has been rounded to the base's
    if config.peft_type == "ADALORA":
        spare_evaluation(loaded)
    return loaded


def trainable(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many the model has in all, the adapter included.

    Quantised weights of a base count as the values they stand for.
    """
    if is_patched(model):
        return count_parameters(model)[:2]
    return model.get_nb_trainable_parameters()


def norm_names(model: nn.Module) -> list[str]:
    """The norms that LN tuning trains: those of the decoder layers, and the last one."""
    layers = decoder_layers(model)
    within = [name for layer in layers for name in layer.norms]
    kinds = {type(norm) for layer in layers for norm in layer.norms.values()}
    stack = layers[0].name.rpartition(".")[0].rpartition(".")[0]
    beside = [name for name, child in model.get_submodule(stack).named_children() if type(child) in kinds]
    return [*within, *(f"{stack}.{name}".lstrip(".") for name in beside)]


def resumes(method: str) -> bool:
    """Whether training can go on from a checkpoint. peft keeps neither the ranks that AdaLoRA has cut off, which may
    return, nor the importance that it has measured."""
    return method != "adalora"


def callbacks(method: str) -> list[TrainerCallback]:
    """What the Trainer has to call for a method while it trains."""
    if method != "adalora":
        return []
    from rosa.training.adalora import AllocateRanks

    return [AllocateRanks()]
