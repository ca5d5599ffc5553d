"""Launches kept by the layout of their tensors: one that was seen before is only given its pointers.

A launch function and Triton's own way from its arguments to the driver take the host longer than a small kernel runs.
What both come to depends on flags and on shapes, strides, dtypes, devices and alignment alone, and is kept by these.
Next time outputs are allocated, pointers filled in, and the compiled kernel is launched by Triton's own launcher: on
the current stream, with the hooks of profilers.

Triton keeps a compiled kernel by less, no length among it: a new length takes the long way once, and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

if TYPE_CHECKING:
    from rosa_kernels.launch import Launch

ALIGNMENT = 16  # bytes: what Triton's binaries know of a pointer is whether it is a multiple
MOST_KEPT = 4096  # some 4 KB each; lengths come back, so that a training run needs a few for each


Layout = tuple[Sequence[int], Sequence[int], torch.dtype]  # shape, strides, dtype


class Kept(NamedTuple):
    """What is left to do of a launch: allocate tensors, put pointers among the arguments, launch."""

    launch: Callable[..., None]  # Triton's compiled kernel, for so many programs
    arguments: list[Any]  # as the kernel has them
    # Which of them is the pointer of which tensor, or a tuple of such and more: of inputs, then outputs, then scratch.
    pointers: list[tuple[int, int]]
    tuples: list[tuple[int, list[int], tuple]]
    outputs: list[Layout]
    scratch: list[Layout]
    zeroed: list[Layout]


KEPT: dict[tuple, Kept] = {}  # clear it after changing a constant that a launch function reads


def run_launch(launch: Callable[..., Launch], *arguments: Any) -> tuple[Tensor, ...]:
    """Launches what the launch function returns for these arguments; returns the outputs, which are no inputs.

    Args:
        launch (callable): a launch function, which looks at no tensor's elements.
        arguments: the launch function's: tensors (the first is one), numbers, lists of numbers and None.
    """
    key, pointers = [launch], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            pointer = argument.data_ptr()
            pointers.append(pointer)
            key += (argument.shape, argument.stride(), argument.dtype, argument.get_device(), pointer % ALIGNMENT)
        else:
            key.append(tuple(argument) if isinstance(argument, list) else argument)
    key = tuple(key)
    kept = KEPT.get(key)
    if kept is None:
        return _run_first(key, launch(*arguments), [t for t in arguments if isinstance(t, Tensor)])
    like = arguments[0]
    outputs = tuple([like.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in kept.outputs])
    scratch = [like.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in kept.scratch]
    scratch += [like.new_zeros(shape, dtype=dtype) for shape, _, dtype in kept.zeroed]
    pointers += [made.data_ptr() for made in (*outputs, *scratch)]
    filled = kept.arguments.copy()  # of this thread
    for place, source in kept.pointers:
        filled[place] = pointers[source]
    for place, sources, rest in kept.tuples:
        filled[place] = (*[pointers[source] for source in sources], *rest)
    if like.get_device() == driver.active.get_current_device():
        kept.launch(*filled)
    else:
        with torch.cuda.device_of(like):
            kept.launch(*filled)
    return outputs


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
    arguments, pointers, tuples = [], [], []
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        parts = value if isinstance(value, tuple) else (value,)
        pointed = [part for part in parts if isinstance(part, Tensor)]
        if any(t.numel() and t.data_ptr() not in source_of for t in pointed):
            return None
        sources, rest = [source_of[t.data_ptr()] for t in pointed if t.numel()], parts[len(pointed) :]
        if pointed and not sources:  # an empty tensor stands for none
            rest = (0, *rest)
        if not isinstance(value, tuple):
            pointers += [(place, source) for source in sources]
            arguments.append(rest[0] if rest else 0)
        elif sources:
            tuples.append((place, sources, rest))
            arguments.append(None)
        else:
            arguments.append(value if not pointed else rest)
    layouts = [[(t.shape, t.stride(), t.dtype) for t in of] for of in (outputs, launch.scratch, launch.zeroed)]
    return Kept(compiled[(launch.programs, 1, 1)], arguments, pointers, tuples, *layouts)
