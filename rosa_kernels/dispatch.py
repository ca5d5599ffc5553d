"""The public op `rope_roae`: its input checks and the choice of backend."""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from rosa_kernels.reference import half_width, rope_roae_reference

BACKENDS = ("triton", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rope_roae(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys (RoPE) and enhances their low-frequency pairs: Z* = Z + Z * (alpha * S), Eq. 4.

    Z are the last n of the R / 2 rotary pairs after rotation, d_low = 2n numbers a head: n real parts, then n imaginary
    ones. The inputs are never changed. The gradient flows to q, k, signal and key_signal.

    Args:
        q (Tensor): queries `[batch, heads, seq, head_dim]`; float16, bfloat16, float32 or float64; any strides.
        k (Tensor): keys `[batch, key_heads, seq, head_dim]`, of q's dtype and device; any strides.
        cos, sin (Tensor): `[1 or batch, seq, rotary]` as Hugging Face gives them, of any floating dtype. The two
            elements of a pair share one value, read at the first of them. With `rotary_dim` given they may also be
            half as wide, one value a pair.
        signal (Tensor): U, the pre-activation of Eq. 2, `[batch, seq, heads * d_low]`; S = SiLU(U) is taken inside.
        key_signal (Tensor, optional): S_K of Eq. 3, already projected, `[batch, seq, key_heads * d_low]`. None, only
            where key_heads equals heads, lets the keys use SiLU(U).
        alpha (float): strength of the enhancement.
        interleaved (bool): pairs are elements 2i and 2i + 1 (GPT-J); otherwise i and i + R / 2 (GPT-NeoX).
        rotary_dim (int, optional): R, the rotary elements of a head; the rest passes through. None takes the width of
            cos.
        backend (str, optional): "triton" or "reference"; None takes the environment variable ROSA_BACKEND, and without
            it "triton" on a GPU and "reference" elsewhere.

    Returns:
        q_out, k_out with the shapes and dtypes of q and k, and where these are dense their memory layouts. Computed in
        float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: an argument is no tensor, or its dtype does not fit.
        ValueError: a shape, device or number does not fit, cos or sin require gradients, or an unknown backend.
        RuntimeError: the Triton backend cannot run on these tensors' device; double backward through it.
    """
    rotary_dim = _check(q, k, cos, sin, signal, key_signal, alpha, rotary_dim)
    if _choose(backend, q) == "reference":
        return rope_roae_reference(
            q, k, cos, sin, signal, key_signal, alpha=alpha, interleaved=interleaved, rotary_dim=rotary_dim
        )
    from rosa_kernels.rope_roae_triton import rope_roae_triton

    cos, sin = half_width(cos, rotary_dim, interleaved), half_width(sin, rotary_dim, interleaved)
    return rope_roae_triton(q, k, cos, sin, signal, key_signal, float(alpha), interleaved)


def available_backends() -> tuple[str, ...]:
    """The backends that can run here: "triton" with a GPU or in Triton's interpreter, and "reference" anywhere."""
    triton_runs = importlib.util.find_spec("triton") and (torch.cuda.is_available() or _interpreter())
    return BACKENDS if triton_runs else ("reference",)


def _interpreter() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _choose(backend: str | None, q: Tensor) -> str:
    backend = backend or os.environ.get("ROSA_BACKEND")
    if backend is None:
        return "triton" if q.is_cuda and "triton" in available_backends() else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend (or ROSA_BACKEND) must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and not (q.is_cuda or _interpreter()):
        raise RuntimeError(
            f"backend='triton' needs tensors on a GPU, got {q.device}; to run the kernels on the CPU in Triton's "
            "interpreter, set TRITON_INTERPRET=1 before rosa_kernels is imported"
        )
    return backend


def _check(q, k, cos, sin, signal, key_signal, alpha, rotary_dim) -> int:
    """Raises on the first argument that does not fit; returns the rotary size."""
    tensors = {"q": q, "k": k, "cos": cos, "sin": sin, "signal": signal}
    if key_signal is not None:
        tensors["key_signal"] = key_signal
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be of a floating dtype (float16, bfloat16, float32, float64), got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device}, but q is on {q.device}: all must be on one device")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype, got q {q.dtype} and k {k.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient: pass them detached (requires_grad is set)")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")

    for name, t in (("q", q), ("k", k)):
        if t.dim() != 4:
            raise ValueError(f"{name} must have the shape [batch, heads, seq, head_dim], got {list(t.shape)}")
    batch, heads, seq, head_dim = q.shape
    key_heads = k.shape[1]
    if heads < 1 or key_heads < 1 or k.shape != (batch, key_heads, seq, head_dim):
        raise ValueError(f"k must be [{batch}, key_heads, {seq}, {head_dim}] as q is, got {list(k.shape)}")

    width = cos.shape[-1] if cos.dim() else 0
    rotary_dim = width if rotary_dim is None else rotary_dim
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"the rotary size must be even and from 2 to head_dim={head_dim}, got {rotary_dim}")
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != seq:
        raise ValueError(f"cos must be [1 or {batch}, {seq}, {rotary_dim}], got {list(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {list(cos.shape)}, got {list(sin.shape)}")
    if width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(f"cos must be {rotary_dim} or {rotary_dim // 2} wide (rotary_dim={rotary_dim}), got {width}")

    d_low = signal.shape[-1] // heads if signal.dim() else 0
    if d_low < 2 or d_low % 2 or d_low > rotary_dim or signal.shape != (batch, seq, heads * d_low):
        raise ValueError(
            f"signal must be [{batch}, {seq}, {heads} heads * d_low] with d_low even and from 2 to {rotary_dim}, "
            f"got {list(signal.shape)}"
        )
    if key_signal is None and key_heads != heads:
        raise ValueError(f"key_signal is needed where key heads ({key_heads}) differ from query heads ({heads})")
    if key_signal is not None and key_signal.shape != (batch, seq, key_heads * d_low):
        raise ValueError(
            f"key_signal must be [{batch}, {seq}, {key_heads * d_low}] ({key_heads} key heads * d_low {d_low}), "
            f"got {list(key_signal.shape)}"
        )
    return rotary_dim
