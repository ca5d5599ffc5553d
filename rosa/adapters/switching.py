"""Several adapters on one model: which there are, which is active, and a block in which none is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from rosa.adapters.record import patched
from rosa.models.sharding import check_not_sharded


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a patched model's adapters, in the order in which they were added.

    Raises:
        ValueError: the model is not patched.
    """
    return list(patched(model)[1].adapters)


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that the model computes with, outside of `disabled`.

    Raises:
        ValueError: the model is not patched.
    """
    return cast(str, patched(model)[1].active)  # None before the first adapter, which `patch` adds


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Switches to another of the model's adapters; its norm weights, gradients and requires_grad flags come with it.

    An optimizer belongs to the adapter that was active when it was built, and so does what DDP or DeepSpeed made of the
    model: step it only while that one is active. DynamicLayerSelection sees to this itself. Backward through what one
    adapter computed belongs before the switch: adapters share the norms, and later it would take the other's values.

    Args:
        model (nn.Module): a patched model.
        adapter_name (str): an adapter that `patch` or `load_adapter` added.

    Raises:
        KeyError: the model has no such adapter.
        ValueError: the model is not patched, is sharded over several processes, is inside `disabled`, its active
            adapter is merged, norms that it trains are offloaded, or what adapters stand in was replaced or copied.
        Nothing is changed after an error.
    """
    record = patched(model)[1]
    record.adapter(adapter_name)
    record.check_switchable(model)
    if adapter_name != record.active:
        record.switch(adapter_name)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forgets an adapter that is not active; the active one goes with `unpatch`, or after a switch to another.

    Raises:
        KeyError: the model has no such adapter.
        ValueError: the model is not patched, is inside `adapters_by_row`, or the adapter is active. Nothing is changed
            then.
    """
    record = patched(model)[1]
    record.adapter(adapter_name)
    record.check_not_by_row()
    if adapter_name == record.active:
        raise ValueError(
            f"the adapter {adapter_name!r} is active: switch to another with rosa.set_adapter first, or take RoSA off "
            "the model with rosa.unpatch"
        )
    del record.adapters[adapter_name]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """A block in which a patched model is its base, for instance for reference log-probabilities.

    Backward through what is computed inside belongs inside. Blocks may be nested; after an exception too, the adapter
    is back with its gradients and flags.

    Raises:
        ValueError: the model is not patched, is sharded over several processes, is inside `adapters_by_row`, its
            active adapter is merged, norms that it trains are offloaded, or what it stands in was replaced or copied.
    """
    record = patched(model)[1]
    record.check_not_by_row()
    record.check_unmerged()
    adapter = record.active_adapter
    if not adapter.attached:
        yield model
        return
    check_not_sharded(model)
    record.check_in_place(model, record.active)
    adapter.check_base_known()
    with adapter.silenced():
        yield model
