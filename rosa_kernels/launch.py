"""What a kernel launch needs besides the kernel: arguments from tensors, and outputs laid out as their inputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rosa_kernels.heads import Heads, Rotary
from rosa_kernels.kept import run_launch

NUM_STAGES = 1  # no software pipelining: its copies in shared memory cost more programs at a time than they gain


class Launch(NamedTuple):
    """A kernel with all that its launch needs: what runs on a GPU, and what the offline compiler looks at.

    Arguments may be tuples, with tensors before all else. `scratch` are tensors among them in which programs leave
    things for each other, and `zeroed` such that begin as zeros: neither outlives the launch.
    """

    kernel: Any
    programs: int
    num_warps: int
    arguments: dict[str, Any]
    outputs: tuple[Tensor, ...]
    scratch: tuple[Tensor, ...] = ()
    zeroed: tuple[Tensor, ...] = ()

    def launch(self) -> Any:
        """Launch on the tensors' own device (not necessarily the current one) and return the compiled kernel, None
        where there is none: of no programs, or in the interpreter."""
        if not self.programs:
            return None
        with torch.cuda.device_of(self.outputs[0]):
            return self.kernel[(self.programs,)](**self.arguments, num_warps=self.num_warps, num_stages=NUM_STAGES)

    def run(self) -> tuple[Tensor, ...]:
        """Launch and return the outputs."""
        self.launch()
        return self.outputs


def cdiv(x: int, y: int) -> int:
    """x / y rounded up. `triton.cdiv` takes the host 1.3 µs, a launch has some five of it."""
    return (x + y - 1) // y


def next_power_of_2(x: int) -> int:
    """The least power of 2 from x on, of a size that is a constant of the graph where torch.compile makes one."""
    return 1 << (int(x) - 1).bit_length()


def _reads_wide(t: Tensor) -> bool:
    """Whether the kernels can read cos or sin as it lies: dense rows, or every other column of rows twice as wide."""
    if t.stride(1) == 2:  # the column between is read too, and must be there behind the last one
        return t.storage_offset() % 2 == 0 and t.stride(0) % 2 == 0 and t.stride(0) >= 2 * t.shape[1]
    return t.stride(1) == 1


def rotary_argument(cos: Tensor, sin: Tensor) -> Rotary:
    """cos and sin, with one column a pair, as the kernels read them: copied if they lie in no way that is read wide."""
    cos, sin = rows(cos), rows(sin)
    if cos.stride(1) != sin.stride(1) or not (_reads_wide(cos) and _reads_wide(sin)):
        cos, sin = cos.contiguous(), sin.contiguous()
    return Rotary(cos, sin, steps(cos)[0], steps(sin)[0])


def heads_argument(t: Tensor) -> Heads:
    """A tensor `[b, h, l, d]` and its strides; no tensor at all is never stepped over."""
    return Heads(t, *(steps(t) if t.dim() == 4 else (0, 0, 0, 1)))


def steps(t: Tensor) -> tuple[int, ...]:
    """A tensor's strides, 0 in dimensions of size 1, whatever torch has there: these are never stepped over.

    A stride of 1 there would be another binary, with narrow loads.
    """
    return tuple([0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)])


def rows(t: Tensor) -> Tensor:
    """`[batch, seq, width]` as `[batch * seq, width]`, a view wherever batch and sequence lie one behind the other."""
    if t.shape[0] == 1:
        return t[0]  # keeps the stride even of a single row, which reshape would set anew
    return t.reshape(t.shape[0] * t.shape[1], t.shape[2])  # not -1: a signal of no heads has no columns


def empty_heads(like: Tensor, sequence_major: bool) -> Tensor:
    """An empty `[b, h, l, d]`; `sequence_major` in memory `[b, l, h, d]`, as Hugging Face's projections have it."""
    batch, heads, seq, head_dim = like.shape
    if sequence_major:
        return like.new_empty(batch, seq, heads, head_dim).transpose(1, 2)
    return like.new_empty(batch, heads, seq, head_dim)


def register(name: str, schema: str, launch: Callable[..., Launch]) -> None:
    """Makes a launch the operator `rosa::name` of torch: opaque to torch.compile, one graph whatever the mode, its
    shapes known on the meta device.

    Plain `define` and `impl`, and autograd functions around the operators, are what costs the host least
    (`benchmarks/bench_dispatch.py`, medians on two x86 cores, torch 2.13): 2 µs a call on top of the launch function's
    21, where the decorator `custom_op` adds 7.5; forward and backward of `rope_roae` together 85 µs, with
    `register_autograd` in place of the autograd function 111, and with neither operators nor torch.compile 76.
    """
    name = f"rosa::{name}"
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", lambda *arguments: _returned(run_launch(launch, *arguments)))
    torch.library.register_fake(name, lambda *arguments: _returned(launch(*arguments).outputs))


def _returned(outputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return outputs if len(outputs) > 1 else outputs[0]


def refuse_double_backward(op: str) -> None:
    """Raises RuntimeError in a backward pass that was asked for a graph: the kernels have no double backward."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}'s Triton backend has no double backward, and this backward was asked for a graph "
            "(create_graph=True); use backend='reference' (or ROSA_BACKEND=reference), which has one"
        )


def refuse_forward_mode(op: str, *arguments: Any) -> None:
    """Raises RuntimeError where one of an op's tensors has a tangent, which the kernels would drop without a word."""
    if forward_ad._current_level < 0:  # no level is entered: all that this costs, as a rule
        return
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in arguments):
        raise RuntimeError(
            f"{op}'s Triton backend has no forward mode of differentiation, and one of its tensors has a tangent; use "
            "backend='reference' (or ROSA_BACKEND=reference), which has one"
        )
