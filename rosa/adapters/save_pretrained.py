"""`save_pretrained` of a patched model saves its adapter, as that of PEFT's models does.

transformers alone would write the norms that RoSA has trained in the place of the base's, and RoAE's weights beside
them, which it leaves out when it loads: a model that is neither the base nor what was trained.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from rosa.adapters.record import is_patched, patched
from rosa.adapters.saving import save_adapter
from rosa.models.sharding import is_sharded


def save_pretrained_saves_adapters() -> None:
    """Has the `save_pretrained` of transformers' models save the active adapter of those that are patched: the folder
    and the main process count, how a base would be written does not. For all others, inside `rosa.disabled`, where a
    patched model is its base (but for the dtype of norms that the adapter trains), and while an adapter is merged, and
    the model is one like any other, it does what it did. Inside `rosa.adapters_by_row`, where a model is several, it
    raises ValueError.
    """
    from transformers import PreTrainedModel  # takes seconds, and by now it has been imported

    original = PreTrainedModel.save_pretrained
    # Not merely the attribute: functools.wraps hands it on to what another library puts around the function.
    if getattr(original, "saves_adapters", None) is original:
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        if is_patched(self):
            patched(self)[1].check_not_by_row()
        if not is_patched(self) or not patched(self)[1].active_adapter.attached:
            return original(self, *args, **kwargs)
        return _save(self, **signature.bind(self, *args, **kwargs).arguments)

    save_pretrained.saves_adapters = save_pretrained
    PreTrainedModel.save_pretrained = save_pretrained


def _save(model: Any, save_directory: Any, is_main_process: bool = True, push_to_hub: bool = False, **_: Any) -> None:
    name = type(model).__name__
    if push_to_hub:
        raise ValueError(f"this {name} is patched: push its adapter with rosa.push_to_hub(model, repo_id)")
    if is_sharded(model):
        raise ValueError(
            f"this {name} is sharded over several processes: save its adapter with rosa.save_adapter(model, folder), "
            "which every rank calls"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"this {name} has an adapter of PEFT's and one of RoSA's, which do not fit into one folder: save RoSA's "
            "with rosa.save_adapter(model, folder), and PEFT's with model.save_pretrained(another_folder) inside "
            "`with rosa.disabled(model)`"
        )
    if is_main_process:
        save_adapter(model, save_directory)
