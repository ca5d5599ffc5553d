"""What a launch costs the host on its way through torch: ways to make the kernels operators, side by side.

On no tokens a launch launches nothing and is not kept (`rosa_kernels.kept`), so that only the host's work is left: the
launch function itself, the same in every row of a group, and what the way of calling it adds.
`rosa_kernels.launch.register` and the autograd functions are the ways that the package takes. These are times of the
host's clock and of this machine's CPU, with a GPU and without.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rosa_kernels.kept import run_launch
from rosa_kernels.launch import register
from rosa_kernels.rope_roae_triton import backward_launch, forward_launch, rope_roae_triton

SCHEMA = (
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor signal, Tensor? key_signal, "
    "float alpha, bool interleaved, bool store_low) -> (Tensor, Tensor, Tensor)"
)
SETTINGS = (0.1, False, True)  # alpha, interleaved, store_low


def python_function(*arguments):
    return run_launch(forward_launch, *arguments)


@torch.library.custom_op("rosa_bench::decorated", mutates_args=())
def custom_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, signal: Tensor, key_signal: Tensor | None,
    alpha: float, interleaved: bool, store_low: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return run_launch(forward_launch, q, k, cos, sin, signal, key_signal, alpha, interleaved, store_low)


register("bench_with_autograd", SCHEMA, forward_launch)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, signal, key_signal, *_ = inputs
    ctx.save_for_backward(cos, sin, signal, key_signal, output[2])


def _backward(ctx, dq_out, dk_out, _):
    needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:6]]
    arguments = (dq_out, dk_out, *ctx.saved_tensors, *SETTINGS[:2], True, needs)
    dq, dk, *dsignals = torch.ops.rosa.rope_roae_backward(*arguments)
    return dq, dk, None, None, *dsignals, None, None, None


torch.library.register_autograd("rosa::bench_with_autograd", _backward, setup_context=_setup_context)


class PythonFunction(torch.autograd.Function):
    """`rope_roae_triton`'s autograd function without the operators."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, signal, key_signal):
        q_out, k_out, low = python_function(q, k, cos, sin, signal, key_signal, *SETTINGS)
        ctx.save_for_backward(cos, sin, signal, key_signal, low)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:6]]
        arguments = (dq_out, dk_out, *ctx.saved_tensors, *SETTINGS[:2], True, needs)
        dq, dk, *dsignals = run_launch(backward_launch, *arguments)
        return dq, dk, None, None, *dsignals


FORWARD = {
    "python function": python_function,
    "define and impl": torch.ops.rosa.rope_roae_forward,
    "custom_op": custom_op,
}
BOTH = {
    "autograd.Function, python function": PythonFunction.apply,
    "autograd.Function, define and impl": lambda *inputs: rope_roae_triton(*inputs, *SETTINGS[:2]),
    "register_autograd, define and impl": lambda *inputs: torch.ops.rosa.bench_with_autograd(*inputs, *SETTINGS)[:2],
}


def no_tokens() -> tuple[Tensor, ...]:
    """q, k, cos, sin, signal, key_signal of a batch of none, grouped heads."""
    q, k = torch.empty(0, 4, 5, 16), torch.empty(0, 2, 5, 16)
    cos, sin = torch.empty(2, 1, 5, 8)
    return q, k, cos, sin, torch.empty(0, 5, 16), torch.empty(0, 5, 8)


@pytest.mark.parametrize("way", FORWARD)
def bench_dispatch_forward(benchmark, way):
    benchmark.group = "dispatch forward, host time"
    inputs = no_tokens()
    benchmark(lambda: FORWARD[way](*inputs, *SETTINGS))


@pytest.mark.parametrize("way", BOTH)
def bench_dispatch_both(benchmark, way):
    benchmark.group = "dispatch both, host time"
    q, k, cos, sin, *signals = no_tokens()
    leaves = [t.requires_grad_() for t in (q, k, *signals)]
    directions = torch.ones_like(q), torch.ones_like(k)
    benchmark(lambda: torch.autograd.grad(BOTH[way](q, k, cos, sin, *signals), leaves, directions))
