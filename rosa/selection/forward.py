"""Watching the forward of the module that runs a model's decoder layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rosa.models.decoder import decoder_layers


def watch_forward(model: nn.Module, note: Callable[[bool], None]) -> RemovableHandle:
    """Calls `note` before every forward of the module that runs the layers, telling it whether that, and so all the
    layers at once, goes into one graph. Copies and pickles of the model go without it.

    Args:
        model (nn.Module): any model with decoder layers, wrapped or not.
        note (callable): of a bool. A graph calls it when torch.compile makes it, and not when it runs.
    """

    @torch.compiler.assume_constant_result  # torch.compile runs it when it makes a graph, not when the graph runs
    def note_graph() -> None:
        note(True)

    def watch(module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            note_graph()
        else:
            note(False)

    name = decoder_layers(model)[0].name.rpartition(".")[0]  # of the list of layers
    runs_layers = model.get_submodule(name.rpartition(".")[0])
    return runs_layers.register_forward_pre_hook(_Watch(watch))


class _Watch:
    """A forward pre-hook that belongs to one optimizer: copies and pickles of the model go without it."""

    def __init__(self, watch: Callable[[nn.Module, tuple], None]):
        self._watch = watch

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self._watch(module, args)

    def __reduce__(self) -> tuple:
        return functools.partial, (_unwatched,)


def _unwatched(module: nn.Module, args: tuple) -> None:
    """What a copy of the model has instead."""
