"""Several optimizers over one model: of selections over the same layers the latest is in charge."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rosa.models.decoder import decoder_layers

if TYPE_CHECKING:
    from rosa.selection.freezing import Freezing

_living: weakref.WeakSet[Freezing] = weakref.WeakSet()


@contextmanager
def taking_charge(freezing: Freezing) -> Iterator[None]:
    """Has older selections over these layers, which a scheduler for example may keep alive, let go of them. They are
    over if the block goes well; if it fails, their next step freezes again.

    Raises:
        ValueError: another selection is at work on these layers, or this optimizer lacks parameters that an earlier
            one has frozen for the moment.
    """
    older = _release_older(freezing)
    yield
    for each in older:
        each.succeeded = True
    _living.add(freezing)


def check_in_charge(freezing: Freezing, call: str) -> None:
    """Raises RuntimeError, naming the call that would be made, where another adapter or a later selection has taken
    over."""
    if freezing.adapter_is_away:
        raise RuntimeError(
            "this optimizer was built for an adapter that is not in the model now, and would move the norms of the "
            f"one that is: switch back with rosa.set_adapter, leave `rosa.disabled`, or rosa.unmerge, before {call}"
        )
    if freezing.succeeded:
        raise RuntimeError(
            f"{call} of a layer selection whose layers a later DynamicLayerSelection has taken over: go on with "
            "that one, or make another over this one's `.optimizer`"
        )


def _release_older(freezing: Freezing) -> list[Freezing]:
    released = []
    held = {id(p) for p in freezing.held_by_optimizer()}
    layers = [{id(p) for p in layer.module.parameters()} for layer in decoder_layers(freezing.model)]
    near = {p for layer in layers if layer & held for p in layer}
    for older in list(_living):
        theirs = older.parameters
        if older.adapter is not freezing.adapter or not any(id(p) in near for p in theirs):
            continue
        if older.choice is not None and not any(id(p) in held for p in theirs):
            raise ValueError(
                "another DynamicLayerSelection is at work on these layers, and two would select apart: give both "
                "groups of parameters to one optimizer, or wrap one optimizer and leave the other plain; if the "
                "other selection has done its work, call its unfreeze() first"
            )
        lost = sum(1 for p in theirs if not p.requires_grad and id(p) not in held)
        if lost:
            raise ValueError(
                f"an earlier layer selection has frozen {lost} parameters that this optimizer lacks and would "
                "never train: call unfreeze() of that selection before you collect another optimizer's parameters"
            )
        older.unfreeze()
        released.append(older)
    return released
