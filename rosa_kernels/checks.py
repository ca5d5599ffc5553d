"""The input checks of the public ops: what was given, what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rotary(q, k, cos, sin, alpha, rotary_dim) -> int:
    """Raises on the first argument of any op that does not fit; returns the rotary size."""
    check_tensors(q=q, k=k, cos=cos, sin=sin)
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype, got q {q.dtype} and k {k.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient: pass them detached (requires_grad is set)")
    if not -math.inf < alpha < math.inf:  # math.isfinite would break torch.compile's graph with dynamic=True
        raise ValueError(f"alpha must be finite, got {alpha}")

    for name, t in (("q", q), ("k", k)):
        if t.dim() != 4:
            raise ValueError(f"{name} must have the shape [batch, heads, seq, head_dim], got {list(t.shape)}")
    batch, heads, seq, head_dim = q.shape
    key_heads = k.shape[1]
    if heads + key_heads < 1 or k.shape != (batch, key_heads, seq, head_dim):
        raise ValueError(f"k must be [{batch}, key_heads, {seq}, {head_dim}] as q is, got {list(k.shape)}")

    width = cos.shape[-1] if cos.dim() else 0
    rotary_dim = width if rotary_dim is None else rotary_dim
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"the rotary size must be even and from 2 to head_dim={head_dim}, got {rotary_dim}")
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != seq:
        raise ValueError(
            f"cos must be [1 or {batch}, {seq}, {rotary_dim}], or {rotary_dim // 2} wide with rotary_dim given, "
            f"got {list(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {list(cos.shape)}, got {list(sin.shape)}")
    if width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(f"cos must be {rotary_dim} or {rotary_dim // 2} wide (rotary_dim={rotary_dim}), got {width}")
    return rotary_dim


def check_signals(q, k, signal, key_signal, rotary_dim) -> None:
    """Raises on a signal of `rope_roae` that does not fit q and k."""
    check_tensors(q=q, signal=signal, **({} if key_signal is None else {"key_signal": key_signal}))
    (batch, heads, seq, _), key_heads = q.shape, k.shape[1]
    if key_signal is None and key_heads != heads:
        raise ValueError(f"key_signal is needed where key heads ({key_heads}) differ from query heads ({heads})")
    if not heads and signal.shape != (batch, seq, 0):
        raise ValueError(f"signal must be [{batch}, {seq}, 0] as there are no query heads, got {list(signal.shape)}")
    d_low = low_size(heads, signal, key_heads, key_signal) if signal.dim() else 0
    name, given, count = ("signal", signal, heads) if heads else ("key_signal", key_signal, key_heads)
    if d_low < 2 or d_low % 2 or d_low > rotary_dim or given.shape != (batch, seq, count * d_low):
        raise ValueError(
            f"{name} must be [{batch}, {seq}, {count} heads * d_low] with d_low even and from 2 to {rotary_dim}, "
            f"got {list(given.shape)}"
        )
    if key_signal is not None and key_signal.shape != (batch, seq, key_heads * d_low):
        raise ValueError(
            f"key_signal must be [{batch}, {seq}, {key_heads * d_low}] ({key_heads} key heads * d_low {d_low}), "
            f"got {list(key_signal.shape)}"
        )


def low_size(heads: int, signal: Tensor, key_heads: int, key_signal: Tensor | None) -> int:
    """d_low, from the signal of the queries or, where there are none, of the keys."""
    if heads:
        return signal.shape[-1] // heads
    return key_signal.shape[-1] // key_heads if key_signal is not None and key_signal.dim() else 0


def check_weights(q, k, hidden_states, down, up, gqa_down, gqa_up, rotary_dim) -> None:
    """Raises on a hidden state or weight of `roae` that does not fit q and k."""
    (batch, heads, seq, _), key_heads = q.shape, k.shape[1]
    if heads < 1 or key_heads < 1:
        raise ValueError(f"roae rotates queries and keys together, got {heads} query heads and {key_heads} key heads")
    if (gqa_down is None) != (gqa_up is None):
        raise ValueError("gqa_down and gqa_up are the two factors of W_GQA: pass both or neither")
    if gqa_down is None and key_heads != heads:
        raise ValueError(f"W_GQA is needed where key heads ({key_heads}) differ from query heads ({heads})")
    grouped = {} if gqa_down is None else {"gqa_down": gqa_down, "gqa_up": gqa_up}
    weights = {"down": down, "up": up, **grouped}
    check_tensors(q=q, hidden_states=hidden_states, **weights)
    for name, t in weights.items():
        if t.dim() != 2:
            raise ValueError(f"{name} must be a matrix, [outputs, inputs], got {list(t.shape)}")
    rank, hidden_size = down.shape
    if rank < 1 or hidden_states.shape != (batch, seq, hidden_size):
        raise ValueError(
            f"hidden_states must be [{batch}, {seq}, hidden_size] and down [rank, hidden_size], "
            f"got {list(hidden_states.shape)} and {list(down.shape)}"
        )
    d_low = up.shape[0] // heads
    if d_low < 2 or d_low % 2 or d_low > rotary_dim or up.shape != (heads * d_low, rank):
        raise ValueError(
            f"up must be [{heads} heads * d_low, rank {rank}] with d_low even and from 2 to {rotary_dim}, "
            f"got {list(up.shape)}"
        )
    expected = {"gqa_down": (rank, heads * d_low), "gqa_up": (key_heads * d_low, rank)}
    for name, t in grouped.items():
        if t.shape != expected[name]:
            raise ValueError(f"{name} must be {list(expected[name])} (d_low {d_low}), got {list(t.shape)}")


def check_tensors(**tensors) -> None:
    """Raises on what is no tensor of a floating dtype, or not on the device of the first of `tensors`."""
    first, like = next(iter(tensors.items()))
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be of a floating dtype (float16, bfloat16, float32, float64), got {t.dtype}")
        if t.device != like.device:
            raise ValueError(f"{name} is on {t.device}, but {first} is on {like.device}: all must be on one device")
