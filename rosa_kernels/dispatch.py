"""The public ops `roae` and `rope_roae`, and the choice of backend."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from rosa_kernels.checks import check_rotary, check_signals, check_weights
from rosa_kernels.reference import half_width, roae_reference, rope_roae_reference, signals

BACKENDS = ("triton", "reference")


def roae(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole of RoAE: the signals S = SiLU(H W_down W_up) (Eq. 2) and S_K = S W_GQA (Eq. 3), then RoPE of queries
    and keys and Eq. 4, Z* = Z + Z * (alpha * S), on the low-frequency pairs, as `rope_roae` does it.

    The inputs are never changed. The gradient flows to q, k, hidden_states and the weights; only those that ask for it
    are computed, and hidden_states is saved for down's gradient alone. A token whose signal is not finite spoils its
    own low-frequency pairs and no others, on every backend.

    Args:
        q (Tensor): queries `[batch, heads, seq, head_dim]`; float16, bfloat16, float32 or float64; any strides
            that leave the elements of one head less than 2^31 elements apart.
        k (Tensor): keys `[batch, key_heads, seq, head_dim]`, of q's dtype and device; any strides, as q.
        cos, sin (Tensor): as `rope_roae` takes them.
        hidden_states (Tensor): H, the attention's input, `[batch, seq, hidden_size]`.
        down (Tensor): W_down, `[rank, hidden_size]`. The weights are laid out as in `nn.Linear` (outputs by inputs), of
            any floating dtype: products are of q's dtype, to which H and the weights are rounded.
        up (Tensor): W_up, `[heads * d_low, rank]`, d_low = 2n numbers a head: n real parts, then n imaginary ones.
        gqa_down, gqa_up (Tensor, optional): the two factors of W_GQA, `[rank, heads * d_low]` and
            `[key_heads * d_low, rank]`. None, only where key_heads equals heads, lets the keys use S.
        alpha (float): strength of the enhancement.
        interleaved, rotary_dim, backend: as `rope_roae` takes them.

    Returns:
        q_out, k_out with the shapes and dtypes of q and k, and where these are dense their memory layouts.

    Raises:
        TypeError: an argument is no tensor, or its dtype does not fit.
        ValueError: a shape, device or number does not fit, cos or sin require gradients, or an unknown backend.
        RuntimeError: the Triton backend cannot run on these tensors' device; double backward or forward mode on it.

    The Triton backend runs one GEMM (H W_down) and one launch, where a program can hold its tiles
    (`roae_triton.fits_one_launch`): 16-bit inputs, ranks up to 256, and at most 16,384 numbers in a head's tile of a
    weight (rank 128 at 64 low-frequency pairs; both count rounded up to a power of 2, and as 16 at least). Otherwise
    the signals come from GEMMs and go to `rope_roae`.
    """
    weights = (down, up, gqa_down, gqa_up)
    rotary_dim = check_rotary(q, k, cos, sin, alpha, rotary_dim)
    check_weights(q, k, hidden_states, *weights, rotary_dim)
    hidden_states = hidden_states.to(q.dtype)
    options: dict[str, Any] = dict(alpha=float(alpha), interleaved=interleaved)
    if choose_backend(backend, q) == "reference":
        return roae_reference(q, k, cos, sin, hidden_states, *weights, rotary_dim=rotary_dim, **options)
    from rosa_kernels.roae_triton import fits_one_launch, roae_triton
    from rosa_kernels.rope_roae_triton import rope_roae_triton

    cos, sin = half_width(cos, rotary_dim, interleaved), half_width(sin, rotary_dim, interleaved)
    if fits_one_launch(q, up):
        return roae_triton(q, k, cos, sin, hidden_states, *weights, **options)
    return rope_roae_triton(q, k, cos, sin, *signals(hidden_states, *weights), **options)


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
    ones. The inputs are never changed. The gradient flows to q, k, signal and key_signal. A signal that is not finite
    spoils its own low-frequency pairs and no others, on every backend.

    Args:
        q (Tensor): queries `[batch, heads, seq, head_dim]`; float16, bfloat16, float32 or float64; any strides
            that leave the elements of one head less than 2^31 elements apart.
        k (Tensor): keys `[batch, key_heads, seq, head_dim]`, of q's dtype and device; any strides, as q. Either of q
            and k may have no heads, its signal no columns, for models that rotate the two apart.
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
        RuntimeError: the Triton backend cannot run on these tensors' device; double backward or forward mode on it.
    """
    rotary_dim = check_rotary(q, k, cos, sin, alpha, rotary_dim)
    check_signals(q, k, signal, key_signal, rotary_dim)
    if choose_backend(backend, q) == "reference":
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


def choose_backend(backend: str | None, q: Tensor) -> str:
    """The backend that an op on `q` takes, as the public ops document it."""
    backend = backend or os.environ.get("ROSA_BACKEND")
    if not backend:  # nor is there one in a variable that is set to nothing
        return "triton" if q.is_cuda and "triton" in available_backends() else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend (or ROSA_BACKEND) must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and not (q.is_cuda or _interpreter()):
        raise RuntimeError(
            f"backend='triton' needs tensors on a GPU, got {q.device}; to run the kernels on the CPU in Triton's "
            "interpreter, set TRITON_INTERPRET=1 before rosa_kernels is imported"
        )
    return backend
