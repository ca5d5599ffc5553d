"""LN tuning of peft, whose norms stay in the base's dtype: in float32, as all other adapters are."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer

from rosa.adapters.norm_weights import keep_dtype, trained_dtype


def widen_norms(model: PeftModel) -> None:
    """Puts the norms that train into float32, in place; the model computes what it did.

    In bfloat16 most steps round to none: one of 0.003 on a weight of 1 does, and Adam's second moment never falls.
    ZeRO-3 has partitioned them, and keeps a float32 copy itself.

    Args:
        model (PeftModel): one that peft has given LN tuning.
    """
    for layer in model.modules():
        if isinstance(layer, LNTuningLayer):
            for norm in layer.ln_tuning_layers.values():
                _widen(norm)


def _widen(norm: torch.nn.Module) -> None:
    for parameter in norm.parameters(recurse=False):
        wide = trained_dtype(norm, parameter.dtype, torch.float32)
        if wide != parameter.dtype and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(wide)
    norm.register_forward_hook(keep_dtype, with_kwargs=True)


def narrow_norms(model: PeftModel) -> None:
    """Puts them into their base's dtype again, as a merged model has them; models without such norms stay as they are.

    Args:
        model (PeftModel): one whose norms `widen_norms` has widened, or any other.
    """
    for layer in model.modules():
        if isinstance(layer, LNTuningLayer):
            layer.ln_tuning_layers.to(layer.base_layer.weight.dtype)
