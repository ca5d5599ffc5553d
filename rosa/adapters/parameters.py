"""What of a patched model is trained, and how much that is."""

from __future__ import annotations

import math

from torch import nn

from rosa.adapters.record import is_patched, patched
from rosa.models.trainable import refuse_offloaded


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the active adapter trains, by full name within the model: its modules' weights and the trained norm weights.

    The names are those of the plain model, whatever wraps it or its modules.

    Raises:
        ValueError: the model is not patched.
    """
    return patched(model)[1].active_adapter.parameters()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to an optimizer: those that require gradients, and in a patched model all that RoSA
    trains, also those that layer selection has frozen for the moment.

    Where all that RoSA trains has been frozen since `patch`, as PEFT's `get_peft_model` and
    `prepare_model_for_kbit_training` do to every parameter that they find, it is let train again.

    Raises:
        ValueError: inside `rosa.disabled` the adapter is not in the model, none trains while it is merged, or what it
            stands in or trains was replaced, or copied by PEFT, since.
        UnsupportedModelError: accelerate offloads a parameter that RoSA trains.
    """
    if is_patched(model):
        record = patched(model)[1]
        record.check_unmerged()
        record.check_in_place(model, record.active)
        adapter = record.active_adapter
        if not adapter.attached:
            raise ValueError("inside `with rosa.disabled(model)` there is no adapter to train: ask before or after it")
        refuse_offloaded({f"{name}.{module.CHILD}": module for name, module in adapter.modules.items()})
        own = adapter.parameters().values()
        if not any(p.requires_grad for p in own):
            for parameter in own:
                parameter.requires_grad_(True)
    return _trainable(model)


def count_parameters(model: nn.Module) -> tuple[int, int, float]:
    """Counts parameters as (trainable, total, percent), the base model's and RoSA's, tied weights once and quantized
    ones as the values they stand for."""
    trainable = sum(p.numel() for p in _trainable(model))
    total = sum(map(_values, model.parameters()))
    return trainable, total, 100 * trainable / total


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints what `count_parameters` counts."""
    trainable, total, percent = count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percent:.4f}")


def _values(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes' 4 bits, which has several values in an element
    return parameter.numel() if state is None else math.prod(state.shape)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    trains = is_patched(model) and not patched(model)[1].kept  # nothing while it is merged
    own = {id(p) for p in adapter_parameters(model).values()} if trains else set()
    return [p for p in model.parameters() if p.requires_grad or id(p) in own]
