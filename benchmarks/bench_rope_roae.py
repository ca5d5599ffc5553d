"""RoPE with RoAE on queries and keys, forward and backward, beside plain RoPE and beside eager PyTorch.

On a GPU: bfloat16, the shapes of the paper's three models, medians of device events after warm-up with the L2 cache
flushed. Without one: float32, small, on the reference backend, so that the benchmarks run anywhere; those times say
nothing about a GPU.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.providers import Inputs, providers
from rosa_kernels.offline import SHAPES, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = (
    [(shape, batch, seq) for shape in SHAPES for batch, seq in ((2, 230), (2, 2048), (1, 16384))]
    if DEVICE == "cuda"
    else [(Shape("small", 4, 2, 64, 8), 2, 64)]
)


def make_inputs(shape: Shape, batch: int, seq: int) -> Inputs:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=DEVICE)

    def heads(count: int) -> torch.Tensor:
        return normal(batch, seq, count, shape.head_dim).transpose(1, 2).requires_grad_()

    angle = torch.rand(1, seq, shape.head_dim // 2, device=DEVICE) * 6.3
    angle = torch.cat((angle, angle), dim=-1)
    d_low = 2 * shape.low_pairs
    return Inputs(
        heads(shape.heads), heads(shape.key_heads), angle.cos().to(dtype), angle.sin().to(dtype),
        normal(batch, seq, shape.heads * d_low).requires_grad_(),
        normal(batch, seq, shape.key_heads * d_low).requires_grad_(),
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "batch", "seq"), CASES, ids=[f"{s.name}-{b}x{n}" for s, b, n in CASES])
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("provider", list(providers(DEVICE)))
def bench_rope_roae(measure, provider, mode, shape, batch, seq):
    torch.compiler.reset()  # a compiled function gives up after eight shapes
    x = make_inputs(shape, batch, seq)
    function = providers(DEVICE)[provider]
    directions = [torch.randn_like(x.q), torch.randn_like(x.k)]
    leaves = x.leaves if provider in ("eager", "fused", "compiled") else x.leaves[:2]
    outputs = function(x)

    def forward():
        return function(x)

    def backward():
        return torch.autograd.grad(outputs, leaves, directions, retain_graph=True)

    def both():
        return torch.autograd.grad(function(x), leaves, directions)

    measure(
        {"forward": forward, "backward": backward, "both": both}[mode],
        op="rope_roae", provider=provider, mode=mode, shape=shape.name, batch=batch, seq=seq,
    )  # fmt: skip
