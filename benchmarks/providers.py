"""What is measured side by side: RoPE as others do it, and RoPE with RoAE as RoSA and as plain PyTorch do it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import rosa_kernels
from benchmarks.cases import DEVICE, DTYPE, HIDDEN, Case
from rosa_kernels import rope_roae

# Backward alone is timed with retain_graph, which a compiled function allows only with this.
torch._functorch.config.donated_buffer = False

ALPHA = 0.1
RANK = 128
PLAIN = ("huggingface", "liger")  # providers of plain RoPE, without an adapter


class RopeInputs(NamedTuple):
    """q `[b, h_q, l, d_h]`, k `[b, h_k, l, d_h]`, cos and sin `[1, l, d_h]`, U and S_K `[b, l, heads * d_low]`."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    signal: Tensor
    key_signal: Tensor


class RoaeInputs(NamedTuple):
    """q, k, cos and sin as in RopeInputs; H `[b, l, d]`; the float32 weights of Eq. 2 and 3, as RoAE has them."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    hidden_states: Tensor
    down: Tensor
    up: Tensor
    gqa_down: Tensor
    gqa_up: Tensor


Inputs = RopeInputs | RoaeInputs
Provider = Callable[[Inputs], tuple[Tensor, Tensor]]


def rope_inputs(case: Case) -> RopeInputs:
    """Random inputs of `rope_roae`, heads laid out as in Hugging Face's models; all but cos and sin need gradients."""
    d_low = 2 * case.shape.low_pairs
    return RopeInputs(
        *_rotary(case),
        _normal(case.batch, case.seq, case.shape.heads * d_low),
        _normal(case.batch, case.seq, case.shape.key_heads * d_low),
    )


def roae_inputs(case: Case) -> RoaeInputs:
    """Random inputs of `roae`, from H; the weights are scaled so that the signal is of order one."""
    hidden, d_low = HIDDEN[case.shape.name], 2 * case.shape.low_pairs
    signal, key_signal = case.shape.heads * d_low, case.shape.key_heads * d_low
    sizes = (RANK, hidden), (signal, RANK), (RANK, signal), (key_signal, RANK)
    weights = [torch.randn(size, device=DEVICE).mul_(size[1] ** -0.5).requires_grad_() for size in sizes]
    return RoaeInputs(*_rotary(case), _normal(case.batch, case.seq, hidden), *weights)


def leaves(x: Inputs, provider: str) -> list[Tensor]:
    """The tensors that get gradients: those that the provider uses."""
    return [x.q, x.k] if provider in PLAIN else [t for t in x if t.requires_grad]


def _rotary(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    angle = torch.rand(1, case.seq, case.shape.head_dim // 2, device=DEVICE) * 6.3
    angle = torch.cat((angle, angle), dim=-1)
    heads = (_normal(case.batch, case.seq, count, case.shape.head_dim) for count in case.shape[1:3])
    q, k = (t.detach().transpose(1, 2).requires_grad_() for t in heads)
    return q, k, angle.cos().to(DTYPE), angle.sin().to(DTYPE)


def _normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=DTYPE, device=DEVICE, requires_grad=True)


def huggingface(x: Inputs) -> tuple[Tensor, Tensor]:
    """Plain RoPE of transformers: no adapter."""
    return apply_rotary_pos_emb(x.q, x.k, x.cos, x.sin)


def liger(x: Inputs) -> tuple[Tensor, Tensor]:
    """Plain RoPE of Liger-Kernel: no adapter. It rotates q and k in place."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(x.q, x.k, x.cos, x.sin)


def eager(x: RopeInputs) -> tuple[Tensor, Tensor]:
    """RoPE with RoAE as one would write it in a model: RoPE of transformers, then Eq. 4, operation by operation."""
    q, k = huggingface(x)
    return enhance(q, F.silu(x.signal)), enhance(k, x.key_signal)


def enhance(z: Tensor, s: Tensor) -> Tensor:
    """Eq. 4 written out: z `[b, h, l, d_h]` after rotation, s `[b, l, h * d_low]` activated."""
    s = s.unflatten(-1, (z.shape[1], -1)).transpose(1, 2)
    half, n = z.shape[-1] // 2, s.shape[-1] // 2
    s_re, s_im = s.split(n, dim=-1)
    re, im = z.split(half, dim=-1)
    re = torch.cat((re[..., :-n], re[..., -n:] + re[..., -n:] * (ALPHA * s_re)), dim=-1)
    im = torch.cat((im[..., :-n], im[..., -n:] + im[..., -n:] * (ALPHA * s_im)), dim=-1)
    return torch.cat((re, im), dim=-1)


def fused(x: RopeInputs) -> tuple[Tensor, Tensor]:
    """RoPE with RoAE as RoSA does it: the Triton kernel on a GPU, the reference elsewhere."""
    return rope_roae(*x, alpha=ALPHA)


def roae_eager(x: RoaeInputs) -> tuple[Tensor, Tensor]:
    """Eq. 2 and 3 as GEMMs, then `eager`."""
    return eager(RopeInputs(x.q, x.k, x.cos, x.sin, *signals(x)))


def roae_separate(x: RoaeInputs) -> tuple[Tensor, Tensor]:
    """Eq. 2 and 3 as GEMMs, then `rope_roae`."""
    return rope_roae(x.q, x.k, x.cos, x.sin, *signals(x), alpha=ALPHA)


def roae_fused(x: RoaeInputs) -> tuple[Tensor, Tensor]:
    """The whole of RoAE as one op."""
    return rosa_kernels.roae(*x, alpha=ALPHA)


def signals(x: RoaeInputs) -> tuple[Tensor, Tensor]:
    """U of Eq. 2 and S_K of Eq. 3, in the activations' dtype."""
    down, up, gqa_down, gqa_up = (w.to(x.hidden_states.dtype) for w in x[5:])
    signal = F.linear(F.linear(x.hidden_states, down), up)
    return signal, F.linear(F.linear(F.silu(signal), gqa_down), gqa_up)


ROPE_ROAE: dict[str, Provider] = {
    "huggingface": huggingface,
    "liger": liger,
    "eager": eager,
    "compiled": torch.compile(eager, dynamic=False, fullgraph=True),
    "fused": fused,
}
ROAE: dict[str, Provider] = {
    "eager": roae_eager,
    "compiled": torch.compile(roae_eager, dynamic=False, fullgraph=True),
    "separate": roae_separate,
    "fused": roae_fused,
}


def unavailable(provider: str, case: Case) -> str | None:
    """Why the provider is not measured here, or None if it is."""
    if provider in ("liger", "compiled") and DEVICE == "cpu":
        return f"{provider} is for GPUs"
    if provider == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if provider == "compiled" and case.batch * case.seq < 4096:
        return "compiling takes tens of seconds a shape, so compiled is measured from 4,096 tokens on"
    return None
