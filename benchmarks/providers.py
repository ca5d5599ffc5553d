"""What is measured side by side: RoPE as others do it, and RoPE with RoAE as RoSA and as plain PyTorch do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from rosa_kernels import rope_roae

ALPHA = 0.1


class Inputs(NamedTuple):
    """q `[b, h_q, l, d_h]`, k `[b, h_k, l, d_h]`, cos and sin `[1, l, d_h]`, U and S_K `[b, l, heads * d_low]`."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    signal: Tensor
    key_signal: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.signal, self.key_signal]


Provider = Callable[[Inputs], tuple[Tensor, Tensor]]


def huggingface(x: Inputs) -> tuple[Tensor, Tensor]:
    """Plain RoPE of transformers: no adapter."""
    return apply_rotary_pos_emb(x.q, x.k, x.cos, x.sin)


def liger(x: Inputs) -> tuple[Tensor, Tensor]:
    """Plain RoPE of Liger-Kernel: no adapter."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(x.q, x.k, x.cos, x.sin)


def eager(x: Inputs) -> tuple[Tensor, Tensor]:
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


def fused(x: Inputs) -> tuple[Tensor, Tensor]:
    """RoPE with RoAE as RoSA does it: the Triton kernel on a GPU, the reference elsewhere."""
    return rope_roae(*x, alpha=ALPHA)


def providers(device: str) -> dict[str, Provider]:
    """The providers that run on `device`, by name."""
    common = {"huggingface": huggingface, "eager": eager, "fused": fused}
    if device == "cuda":
        common |= {"liger": liger, "compiled": torch.compile(eager, dynamic=False, fullgraph=True)}
    return common
