"""Launches kept by the layout of their tensors: one that was seen before is only given its pointers.

A launch function and Triton's own way from its arguments to the driver take the host longer than a small kernel runs.
What both come to depends on flags and on shapes, strides, dtypes, devices and alignment alone, and is kept by these.
Next time outputs are allocated, pointers filled in, and the compiled kernel is launched by Triton's own launcher: on
the current stream, with the hooks of profilers.

Triton keeps a compiled kernel by less, no length among it: a new length takes the long way once, and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from math import gcd
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

if TYPE_CHECKING:
    from rosa_kernels.launch import Launch

ALIGNMENT = 16  # bytes: what Triton's binaries know of a pointer is whether it is a multiple
MOST_KEPT = 4096  # some 6 KB each; lengths come back, so that a training run needs a few for each
NO_TENSORS = frozenset((bool, int, float, type(None)))  # asked for first: isinstance takes 0.1 us to say no


class Kept(NamedTuple):
    """What is left to do of a launch: allocate tensors, pick the arguments from pointers and numbers, launch."""

    compiled: CompiledKernel
    programs: int
    # Laid out as the tensors to allocate, and without memory: `empty_like` takes the host less than any other way.
    outputs: list[Tensor]
    scratch: list[Tensor]
    zeroed: list[Tensor]
    # Arguments are picked from the pointers of inputs, outputs and scratch, these numbers, and the arguments that are
    # tuples, which are picked from what is before them.
    numbers: list[Any]
    tuples: list[Callable[[list], tuple]]
    arguments: Callable[[list], tuple]


KEPT: dict[tuple, Kept] = {}  # clear it after changing a constant that a launch function reads


def run_launch(launch: Callable[..., Launch], *arguments: Any) -> tuple[Tensor, ...]:
    """Launches what the launch function returns for these arguments; returns the outputs, which are no inputs.

    Args:
        launch (callable): a launch function, which looks at no tensor's elements.
        arguments: the launch function's: tensors (the first is one, and all are on its device), numbers, lists of
            numbers and None.
    """
    device = arguments[0].get_device()
    key, pool = [launch, device], []
    for argument in arguments:
        if type(argument) in NO_TENSORS:
            key.append(argument)
        elif isinstance(argument, Tensor):
            key += (argument.shape, argument.stride(), argument.dtype)
            pool.append(argument.data_ptr())
        else:
            key.append(tuple(argument))
    key.append(gcd(ALIGNMENT, *pool) == ALIGNMENT or tuple([pointer % ALIGNMENT for pointer in pool]))
    key = tuple(key)
    kept = KEPT.get(key)
    if kept is None:
        return _run_first(key, launch(*arguments), [t for t in arguments if isinstance(t, Tensor)])
    compiled, programs, outputs, scratch, zeroed, numbers, tuples, picked = kept
    outputs = tuple([torch.empty_like(t) for t in outputs])
    pool += [t.data_ptr() for t in outputs]
    if scratch or zeroed:  # held until the launch
        scratch = [torch.empty_like(t) for t in scratch] + [torch.zeros_like(t) for t in zeroed]
        pool += [t.data_ptr() for t in scratch]
    pool += numbers
    pool += [pick(pool) for pick in tuples]
    if device == driver.active.get_current_device():
        _launch(compiled, programs, device, picked(pool))
    else:
        with torch.cuda.device(device):
            _launch(compiled, programs, device, picked(pool))
    return outputs


def _launch(compiled: CompiledKernel, programs: int, device: int, arguments: tuple) -> None:
    """As `compiled[(programs, 1, 1)](*arguments)`, which also calls the hooks of profilers where there are none."""
    stream, hooks = driver.active.get_current_stream(device), knobs.runtime
    if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
        compiled[(programs, 1, 1)](*arguments, stream=stream)
    else:
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )  # fmt: skip


def _run_first(key: tuple, launch: Launch, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    compiled = launch.launch()
    given = {id(t) for t in inputs}
    outputs = tuple([t for t in launch.outputs if id(t) not in given])
    if isinstance(compiled, CompiledKernel) and (kept := _kept(launch, compiled, inputs, outputs)):
        if len(KEPT) >= MOST_KEPT:
            KEPT.clear()
        KEPT[key] = kept
    return outputs


def _kept(launch: Launch, compiled: CompiledKernel, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Kept | None:
    """None where a pointer is of none of the tensors, as of a copy, or may be of two that are at the same address."""
    tensors = (*inputs, *outputs, *launch.scratch, *launch.zeroed)
    source_of = {t.data_ptr(): source for source, t in enumerate(tensors) if t.numel()}
    if len(source_of) < sum(t.numel() > 0 for t in tensors):
        return None
    values = [launch.arguments[name] for name in launch.kernel.arg_names]
    pointed = [part for value in values for part in _parts(value) if isinstance(part, Tensor) and part.numel()]
    if any(t.data_ptr() not in source_of for t in pointed):
        return None
    numbers = []

    def place(part: Any) -> int:
        """Where in the pool a tensor's pointer is, or a number."""
        if isinstance(part, Tensor) and part.numel():
            return source_of[part.data_ptr()]
        numbers.append(0 if isinstance(part, Tensor) else part)  # an empty tensor stands for none
        return len(tensors) + len(numbers) - 1

    places = [[*map(place, value)] if _has_tensors(value) else place(value) for value in values]
    tuples = [of_parts for of_parts in places if isinstance(of_parts, list)]
    place_of_tuple = count(len(tensors) + len(numbers))
    arguments = [next(place_of_tuple) if isinstance(of_value, list) else of_value for of_value in places]
    return Kept(
        compiled,
        launch.programs,
        *[[_without_memory(t) for t in of] for of in (outputs, launch.scratch, launch.zeroed)],
        numbers,
        [itemgetter(*of_parts) for of_parts in tuples],
        itemgetter(*arguments),
    )


def _parts(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value)


def _without_memory(t: Tensor) -> Tensor:
    """A tensor laid out alike whose memory is given back."""
    like = torch.empty_like(t)
    like.untyped_storage().resize_(0)
    return like
