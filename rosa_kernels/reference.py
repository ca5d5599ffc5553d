"""RoAE on rotated queries and keys in plain PyTorch: the specification that every backend is tested against.

Symbols: b batch, l sequence, h heads, R rotary size of a head, n low-frequency pairs, d_low = 2n.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_kernels.checks import low_size


def rope_roae_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    signal: Tensor,
    key_signal: Tensor | None = None,
    *,
    alpha: float = 0.1,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What `rosa_kernels.rope_roae` computes, which documents the arguments, in differentiable PyTorch.

    It computes in float32 (float64 for float64 queries), as the kernels do, and rounds once, to the inputs' dtype.
    """
    compute = compute_dtype(q.dtype)
    rotary_dim = cos.shape[-1] if rotary_dim is None else rotary_dim
    cos, sin = (half_width(t, rotary_dim, interleaved).to(compute).unsqueeze(1) for t in (cos, sin))

    query_signal = F.silu(signal.to(compute))  # S of Eq. 2
    key_signal = query_signal if key_signal is None else key_signal.to(compute)  # S_K of Eq. 3
    d_low = low_size(q.shape[1], query_signal, k.shape[1], key_signal)
    q, k = (
        _enhance(x, cos, sin, s.unflatten(-1, (x.shape[1], d_low)).transpose(1, 2), alpha, interleaved, compute)
        for x, s in ((q, query_signal), (k, key_signal))
    )
    return q, k


def roae_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    hidden_states: Tensor,
    down: Tensor,
    up: Tensor,
    gqa_down: Tensor | None = None,
    gqa_up: Tensor | None = None,
    *,
    alpha: float = 0.1,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What `rosa_kernels.roae` computes, which documents the arguments, in differentiable PyTorch."""
    U, S_K = signals(hidden_states.to(q.dtype), down, up, gqa_down, gqa_up)
    return rope_roae_reference(q, k, cos, sin, U, S_K, alpha=alpha, interleaved=interleaved, rotary_dim=rotary_dim)


def signals(
    hidden_states: Tensor, down: Tensor, up: Tensor, gqa_down: Tensor | None, gqa_up: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """U of Eq. 2 and S_K of Eq. 3, for `rope_roae`: `[batch, seq, heads * d_low]` each.

    Products are in H's dtype, whatever autocast prefers. Weights with a dimension more, `[batch, outputs, inputs]`, are
    those of each sequence.
    """
    dtype, device_type = hidden_states.dtype, hidden_states.device.type
    autocasts = torch.amp.is_autocast_available(device_type)  # the meta device does not
    with torch.autocast(device_type, enabled=False) if autocasts else nullcontext():
        U = _product(_product(hidden_states, down.to(dtype)), up.to(dtype))  # Eq. 2, S = SiLU(U)
        if gqa_down is None or gqa_up is None:
            return U, None
        return U, _product(_product(F.silu(U), gqa_down.to(dtype)), gqa_up.to(dtype))  # Eq. 3, S_K = S W_GQA


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if weight.dim() == 2 else torch.bmm(x, weight.mT)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What every backend computes in, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def half_width(t: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """cos or sin with one column a pair: `[..., rotary_dim / 2]`, a view of the given `[..., rotary_dim]` or itself."""
    if t.shape[-1] == rotary_dim // 2:
        return t
    return t[..., ::2] if interleaved else t[..., : rotary_dim // 2]


def _enhance(
    x: Tensor, cos: Tensor, sin: Tensor, s: Tensor, alpha: float, interleaved: bool, compute: torch.dtype
) -> Tensor:
    """RoPE of x, and Eq. 4 on the low-frequency pairs. x `[b, h, l, head_dim]`, s `[b, h, l, d_low]`, real then
    imag."""
    pairs, n = cos.shape[-1], s.shape[-1] // 2
    rotary, rest = x.to(compute).split((2 * pairs, x.shape[-1] - 2 * pairs), dim=-1)
    re, im = rotary.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else rotary.chunk(2, dim=-1)
    re, im = re * cos - im * sin, im * cos + re * sin

    s_re, s_im = s.split(n, dim=-1)
    re, im = _enhance_low(re, s_re, alpha), _enhance_low(im, s_im, alpha)

    rotary = torch.stack((re, im), dim=-1 if interleaved else -2).flatten(-2)
    return torch.empty_like(x).copy_(torch.cat((rotary, rest), dim=-1))  # x's dtype and memory layout


def _enhance_low(z: Tensor, s: Tensor, alpha: float) -> Tensor:
    """Eq. 4, Z* = Z + Z * (alpha * S). Frequency falls along the pairs, so the low ones are the last of them."""
    high, low = z.split((z.shape[-1] - s.shape[-1], s.shape[-1]), dim=-1)
    return torch.cat((high, low + low * (alpha * s)), dim=-1)
