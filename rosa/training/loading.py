"""`rosa.load`: an adapter on the base that it names, ready to be used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rosa.adapters.base import base_named_by, find_base
from rosa.adapters.folder import local_folder, read_description
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.composition.disk import WEIGHTS_NAME as COMPOSITION_NAME
from rosa.composition.disk import load_composition, read_composition
from rosa.data.conversation import turn_end
from rosa.data.prompt_form import CHAT, read_form
from rosa.training.methods import load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(
    source: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    load_in: str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads an adapter and the base that it names, in evaluation mode.

    Args:
        source (path or str): an adapter's folder, or a repository of the Hugging Face hub ("user/name"): RoSA's,
            RoAd's, one of peft's, or the folder of a composition.
        base (path or str, optional): folder or Hub name of the base; None takes the one that the adapter names, at the
            commit that it was trained on if it names that too.
        dtype (str or torch.dtype): of the base's parameters; "auto" as they were saved.
        load_in (str, optional): "4bit" or "8bit" quantizes the base while it is loaded.
        device_map (str or dict, optional): as transformers takes it; None puts the model on the first GPU, or on the
            CPU where there is none.
        attn_implementation (str, optional): attention back end; None takes transformers' choice.
        revision (str, optional): branch, tag or commit of the adapter on the hub; None is "main".
        token (str, optional): for the adapter on the hub; None takes the one that `hf auth login` stored, or HF_TOKEN.

    Returns:
        (nn.Module, PreTrainedTokenizerBase): the model, patched (of a composition composed, with no task chosen; of
        peft's adapters but RoAd's, peft's wrapper), and the tokenizer: the adapter's if it has one, else the base's.
        Where the adapter learnt conversations, the model's generation config ends an answer where they end a turn.

    Raises:
        FileNotFoundError: the adapter or its base is not there.
        ValueError: the adapter is damaged or does not fit the base, it names none, or the base cannot be loaded.
    """
    folder = local_folder(source, revision, token)
    is_composition = (folder / COMPOSITION_NAME).is_file()
    description = read_composition(folder) if is_composition else read_description(folder)
    given = None if base is None else os.fspath(base)
    found = find_base({folder: description}, given)
    with base_named_by([folder], given):
        tokenizer = load_tokenizer(found.name, revision=found.revision, beside=[folder])
        model = load_model(
            found.name,
            dtype,
            load_in=load_in,
            attn_implementation=attn_implementation,
            revision=found.revision,
            device_map=device_map,
        )
    model = load_composition(model, folder) if is_composition else load_trained(model, folder)
    if read_form(folder) == CHAT:
        end_turns(model, tokenizer)
    if device_map is None:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def end_turns(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Has the model's generation config end an answer where conversations are learnt to end a turn, too."""
    config, end = model.generation_config, turn_end(tokenizer)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end is not None and end not in known:
        config.eos_token_id = [token for token in known if token is not None] + [end]
