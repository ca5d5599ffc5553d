"""The whole of RoAE on the Triton backend: the launches, their operators and the autograd function.

Forward is one GEMM, H W_down, and one launch. Backward is a launch for the keys of grouped-query attention, one for the
rest, and the GEMMs of those gradients that are asked for. The kernels are in `roae_forward_kernel.py` and
`roae_backward_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from rosa_kernels.heads import Rotary
from rosa_kernels.launch import (
    Launch,
    cdiv,
    empty_heads,
    heads_argument,
    next_power_of_2,
    refuse_double_backward,
    refuse_forward_mode,
    register,
    rotary_argument,
)
from rosa_kernels.reference import compute_dtype
from rosa_kernels.roae_backward_kernels import roae_backward_kernel, roae_backward_keys_kernel
from rosa_kernels.roae_forward_kernel import roae_forward_kernel
from rosa_kernels.roae_tiles import Shape

NUM_WARPS = 4
# Of the loops over heads; 2 hides their waits for memory, and takes 12 and 30 KiB of shared memory more.
HEAD_STAGES = 1
PROGRAMS = 1024  # to aim at: some waves of what a large GPU holds at once
# Eq. 3 of a block of tokens is divided while there are fewer programs of it than this, into parts of four steps or
# more: the keys are then never the longest work of a launch (a step is 0.9 us on an RTX 3090, all heads of a token 20
# ns).
KEY_PROGRAMS = 128
KEY_STEPS = 4
KEYS_AHEAD_BELOW = 8192  # tokens; with more the keys' products hide behind the queries' traffic
MIN_DOT = 16  # the smallest side of a tile that tl.dot takes
# The most bytes of a number on a GPU: without tensor cores, the products of float32 and float64 spill up to 2,880 bytes
# a thread.
ONE_LAUNCH_BYTES = 2
MAX_RANK = 256  # a latent is held whole
MAX_WEIGHT_TILE = 64 * 128  # low-frequency pairs by ranks, in shared memory: more would not fit every card's
BLOCK_S = 32  # columns of S at a time, for Eq. 3: 64 take 158 registers
# Pairs of 32 tokens that a program's registers hold without spills, those of low frequency counted three times (they,
# their signal and its gradient). With more a program does 16 tokens, and with more than twice as many it has twice the
# warps.
PAIRS_OF_32_TOKENS = 112


def forward_launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, latent: Tensor,
    up: Tensor, gqa_down: Tensor | None, gqa_up: Tensor | None, alpha: float, interleaved: bool, store: bool,
) -> Launch:  # fmt: skip
    """The forward launch. Its outputs are q_out, k_out, the compact low-frequency pairs `[tokens, heads * d_low]` and
    the latent of Eq. 3, S times W_GQA's first factor, `[tokens, rank]`: the last two empty without `store`.

    The latent H W_down is dense, `[tokens, rank]`; cos and sin come with one column a pair, `[1 or b, l, R / 2]`; the
    other arguments are as `roae` has them.
    """
    grouped = gqa_down is not None
    rotary = rotary_argument(cos, sin)
    shape = _shape(q, k, rotary, latent, up.shape[0], interleaved)
    tokens, blocks = _tokens(q, shape)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    low = q.new_empty(tokens, up.shape[0] // q.shape[1] * (q.shape[1] + k.shape[1]) if store else 0)
    key_latent = latent.new_empty(tokens, latent.shape[1] if store and grouped else 0)
    key_parts = _key_parts(blocks, up.shape[0]) if grouped else 0
    shared = isinstance(key_parts, int) and key_parts > 1  # not asked of symbolic sizes: they want the outputs alone
    part = shape.BLOCK_T * shape.BLOCK_R
    partials = q.new_empty(blocks * key_parts * part if shared else 0, dtype=compute_dtype(q.dtype))
    arrived = q.new_zeros(blocks, dtype=torch.int32) if shared else q.new_empty(0, dtype=torch.int32)
    heads_per_program = _heads_per_program(blocks, q.shape[1])
    arguments = dict(
        q=heads_argument(q), k=heads_argument(k), q_out=heads_argument(q_out), k_out=heads_argument(k_out),
        latent=latent, up=up, gqa_down=gqa_down if grouped else up, gqa_up=gqa_up if grouped else up,
        low=low, key_latent=key_latent,
        partials=partials, arrived=arrived,
        heads_per_program=heads_per_program, key_parts=key_parts, keys_ahead_below=KEYS_AHEAD_BELOW,
        GROUPED=grouped, STORE=store,
        **_common(q, rotary, alpha),
    )  # fmt: skip
    programs = blocks * (cdiv(q.shape[1], heads_per_program) + key_parts)
    launch = _launch(roae_forward_kernel, programs, shape, arguments, (q_out, k_out, low, key_latent))
    return launch._replace(scratch=(partials,), zeroed=(arrived,)) if shared else launch


def backward_keys_launch(
    dk_out: Tensor, cos: Tensor, sin: Tensor, gqa_up: Tensor, low: Tensor, key_latent: Tensor, heads: int,
    alpha: float, interleaved: bool, sequence_major: bool, need_dx: bool, need_du: bool, need_dgqa: bool,
) -> Launch:  # fmt: skip
    """The first backward launch of grouped-query attention, over the keys alone.

    Its outputs are dk (with `need_dx`), the gradient of Eq. 3's latent `[tokens, rank]` (`need_du`) and dS_K
    `[tokens, key_heads * d_low]` (`need_dgqa`): what is not asked for is empty. `heads` counts the query heads.
    """
    rotary = rotary_argument(cos, sin)
    shape = _shape(dk_out, dk_out, rotary, key_latent, gqa_up.shape[0], interleaved)
    # All heads in one program: small blocks, so that there are enough of them.
    shape = shape._replace(HEADS=heads, BLOCK_T=MIN_DOT)
    tokens, blocks = _tokens(dk_out, shape)
    dk = empty_heads(dk_out, sequence_major) if need_dx else dk_out.new_empty(0)
    dkey_latent = key_latent.new_empty(tokens, key_latent.shape[1] if need_du else 0)
    dkey_signal = key_latent.new_empty(tokens, gqa_up.shape[0] if need_dgqa else 0)
    arguments = dict(
        dk_out=heads_argument(dk_out), dk=heads_argument(dk), gqa_up=gqa_up, low=low, key_latent=key_latent,
        dkey_signal=dkey_signal, dkey_latent=dkey_latent, NEED_DX=need_dx, NEED_DU=need_du, NEED_DGQA=need_dgqa,
        **_common(dk_out, rotary, alpha),
    )  # fmt: skip
    return _launch(roae_backward_keys_kernel, blocks, shape, arguments, (dk, dkey_latent, dkey_signal))


def backward_launch(
    dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, latent: Tensor, up: Tensor, gqa_down: Tensor | None,
    low: Tensor, dkey_latent: Tensor | None, alpha: float, interleaved: bool, sequence_major: bool,
    need_dx: bool, need_du: bool, need_dgqa: bool,
) -> Launch:  # fmt: skip
    """The backward launch over the queries, and over the keys where they share the queries' signal (no `gqa_down`).

    Its outputs are dq and dk (with `need_dx`; dk only of keys that share), dU `[tokens, heads * d_low]` (`need_du`) and
    S alike (`need_dgqa`): what is not asked for is empty. `sequence_major` lays dq and dk out as `[b, l, h, d]`, as
    Hugging Face's projections have it, so that their own backward needs no copy.
    """
    grouped = gqa_down is not None
    rotary = rotary_argument(cos, sin)
    shape = _shape(dq_out, dk_out, rotary, latent, up.shape[0], interleaved)
    tokens, blocks = _tokens(dq_out, shape)
    dq = empty_heads(dq_out, sequence_major) if need_dx else dq_out.new_empty(0)
    dk = empty_heads(dk_out, sequence_major) if need_dx and not grouped else dk_out.new_empty(0)
    du = latent.new_empty(tokens, up.shape[0] if need_du else 0)
    signal = latent.new_empty(tokens, up.shape[0] if need_dgqa else 0)
    heads_per_program = _heads_per_program(blocks, dq_out.shape[1])
    arguments = dict(
        dq_out=heads_argument(dq_out), dk_out=heads_argument(dq_out if grouped else dk_out),
        dq=heads_argument(dq), dk=heads_argument(dk), latent=latent, up=up, gqa_down=gqa_down if grouped else up,
        low=low, dkey_latent=dkey_latent if grouped else latent, du=du, signal=signal,
        heads_per_program=heads_per_program,
        GROUPED=grouped, NEED_DX=need_dx, NEED_DU=need_du, NEED_DGQA=need_dgqa,
        **_common(dq_out, rotary, alpha),
    )  # fmt: skip
    programs = blocks * cdiv(dq_out.shape[1], heads_per_program)
    return _launch(roae_backward_kernel, programs, shape, arguments, (dq, dk, du, signal))


def _shape(q: Tensor, k: Tensor, rotary: Rotary, latent: Tensor, columns: int, interleaved: bool) -> Shape:
    """What the binary depends on; q and k may be gradients; `columns` are those of q's signal."""
    heads, head_dim, pairs = q.shape[1], q.shape[3], rotary.cos.shape[1]
    low_pairs = columns // heads // 2
    block_low = max(MIN_DOT, next_power_of_2(low_pairs))
    split = max(0, pairs - block_low)
    block_high = next_power_of_2(max(1, split))
    block_rest = next_power_of_2(max(1, head_dim - 2 * pairs))
    shape = Shape(
        HEADS=heads, KEY_HEADS=k.shape[1], HEAD_DIM=head_dim, PAIRS=pairs, LOW_PAIRS=low_pairs, SPLIT=split,
        RANK=latent.shape[1], INTERLEAVED=interleaved, ROTARY_STEP=rotary.cos.stride(1),
        BLOCK_T=MIN_DOT, BLOCK_HIGH=block_high, BLOCK_LOW=block_low, BLOCK_REST=block_rest,
        BLOCK_R=max(MIN_DOT, next_power_of_2(latent.shape[1])), BLOCK_S=BLOCK_S, HEAD_STAGES=HEAD_STAGES,
        COMPUTE=getattr(tl, str(compute_dtype(q.dtype)).removeprefix("torch.")), DOT=_dot_dtype(latent),
    )  # fmt: skip
    if _held(shape) <= PAIRS_OF_32_TOKENS:
        shape = shape._replace(BLOCK_T=32 * NUM_WARPS // 4)
    return shape


def _held(shape: Shape) -> int:
    """Pairs of a token that a program holds."""
    pairs = max(shape.BLOCK_HIGH, shape.BLOCK_REST) + 3 * shape.BLOCK_LOW
    return 2 * pairs if shape.INTERLEAVED else pairs


def _launch(kernel: Any, programs: int, shape: Shape, arguments: dict[str, Any], outputs: tuple[Tensor, ...]) -> Launch:
    num_warps = NUM_WARPS if _held(shape) <= 2 * PAIRS_OF_32_TOKENS else 2 * NUM_WARPS
    arguments["shape"] = Shape(*map(tl.constexpr, shape))
    return Launch(kernel, programs, num_warps, arguments, outputs)


def _common(q: Tensor, rotary: Rotary, alpha: float) -> dict[str, Any]:
    """The arguments that all kernels share."""
    batch, _, seq, _ = q.shape
    return dict(rotary=rotary, alpha=alpha, tokens=batch * seq, seq=seq, cos_rows=rotary.cos.shape[0])


def _dot_dtype(latent: Tensor) -> tl.dtype:
    """The latent's dtype; but Triton's interpreter, on the CPU, multiplies the bit patterns of bfloat16."""
    if latent.dtype == torch.bfloat16 and latent.device.type == "cpu":
        return tl.float32
    return getattr(tl, str(latent.dtype).removeprefix("torch."))


def _tokens(q: Tensor, shape: Shape) -> tuple[int, int]:
    """The number of tokens, and of blocks of them."""
    tokens = q.shape[0] * q.shape[2]
    return tokens, cdiv(tokens, shape.BLOCK_T)


# Written without a branch on the tokens, by which torch.compile would make a graph for each outcome.
def _heads_per_program(blocks: int, heads: int) -> int:
    """As many heads as leave some PROGRAMS programs, which with few tokens is one."""
    return torch.sym_min(torch.sym_max(1, blocks * heads // PROGRAMS), heads)


def _key_parts(blocks: int, columns: int) -> int:
    """How many programs share Eq. 3 of a block."""
    most = max(1, cdiv(columns, BLOCK_S) // KEY_STEPS)
    return torch.sym_min(torch.sym_max(1, KEY_PROGRAMS // torch.sym_max(1, blocks)), most)


register(
    "roae_forward",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor latent, Tensor up, Tensor? gqa_down, Tensor? gqa_up, "
    "float alpha, bool interleaved, bool store) -> (Tensor, Tensor, Tensor, Tensor)",
    forward_launch,
)
register(
    "roae_backward_keys",
    "(Tensor dk_out, Tensor cos, Tensor sin, Tensor gqa_up, Tensor low, Tensor key_latent, int heads, float alpha, "
    "bool interleaved, bool sequence_major, bool need_dx, bool need_du, bool need_dgqa) -> (Tensor, Tensor, Tensor)",
    backward_keys_launch,
)
register(
    "roae_backward",
    "(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, Tensor latent, Tensor up, Tensor? gqa_down, Tensor low, "
    "Tensor? dkey_latent, float alpha, bool interleaved, bool sequence_major, bool need_dx, bool need_du, "
    "bool need_dgqa) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_launch,
)


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dY^T X, `[columns of dY, columns of X]`, in the weight's dtype.

    A float32 gradient of 16-bit activations comes out of the GEMM as it was summed: not rounded, with no cast kernel.
    """
    if dtype == dy.dtype:
        return dy.T @ x
    if dy.is_cuda and dtype == torch.float32:
        return torch.mm(dy.T, x, out_dtype=dtype)
    wide = torch.promote_types(dy.dtype, dtype)
    return (dy.T.to(wide) @ x.to(wide)).to(dtype)


# An operator, since torch.compile does not know `out_dtype` everywhere.
torch.library.define(
    "rosa::weight_gradient", "(Tensor dy, Tensor x, ScalarType dtype) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl("rosa::weight_gradient", "default", _weight_gradient)
torch.library.register_fake(
    "rosa::weight_gradient", lambda dy, x, dtype: dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
)


class _RoAE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, hidden_states, down, up, gqa_down, gqa_up, alpha, interleaved):
        latent, *weights = _project_down(hidden_states, down, up, gqa_down, gqa_up)
        q_out, k_out, low, key_latent = torch.ops.rosa.roae_forward(
            q, k, cos, sin, latent, *weights, alpha, interleaved, any(ctx.needs_input_grad)
        )
        kept = hidden_states if ctx.needs_input_grad[5] else None  # only W_down's gradient asks for H
        ctx.save_for_backward(cos, sin, kept, down, latent, up, gqa_down, gqa_up, low, key_latent)
        ctx.sequence_major = q.stride(1) <= q.stride(2)
        ctx.alpha, ctx.interleaved, ctx.hidden_shape = alpha, interleaved, hidden_states.shape
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        refuse_double_backward("roae")
        with torch.autocast(dq_out.device.type, enabled=False):
            return _backward(ctx, dq_out, dk_out)


def _backward(ctx, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, hidden_states, *weights_and_saved = ctx.saved_tensors
    down, latent, up, gqa_down, gqa_up, low, key_latent = weights_and_saved
    needs_q, needs_k, _, _, needs_hidden, needs_down, needs_up, *needs_gqa = ctx.needs_input_grad[:9]
    need_dgqa = any(needs_gqa)
    needs = (needs_q or needs_k, needs_hidden or needs_down or needs_up or need_dgqa, need_dgqa)
    options = (ctx.alpha, ctx.interleaved, ctx.sequence_major, *needs)
    w_down, w_up, w_gqa_down, w_gqa_up = _rounded((down if needs_hidden else None, up, gqa_down, gqa_up), latent.dtype)

    dkey_latent = None
    if gqa_down is not None:
        dk, dkey_latent, dkey_signal = torch.ops.rosa.roae_backward_keys(
            dk_out, cos, sin, w_gqa_up, low, key_latent, dq_out.shape[1], *options
        )
    dq, dk_shared, du, signal = torch.ops.rosa.roae_backward(
        dq_out, dk_out, cos, sin, latent, w_up, w_gqa_down, low, dkey_latent, *options
    )
    if gqa_down is None:
        dk = dk_shared
    grads = [dq if needs_q else None, dk if needs_k else None, *[None] * 9]
    if needs_hidden or needs_down:
        dlatent = du @ w_up
    if needs_hidden:
        grads[4] = (dlatent @ w_down).view(ctx.hidden_shape)
    if needs_down:
        grads[5] = torch.ops.rosa.weight_gradient(dlatent, hidden_states.reshape(-1, down.shape[1]), down.dtype)
    if needs_up:
        grads[6] = torch.ops.rosa.weight_gradient(du, latent, up.dtype)
    if needs_gqa[0]:
        grads[7] = torch.ops.rosa.weight_gradient(dkey_latent, signal, gqa_down.dtype)
    if needs_gqa[1]:
        grads[8] = torch.ops.rosa.weight_gradient(dkey_signal, key_latent, gqa_up.dtype)
    return tuple(grads)


def _project_down(hidden_states: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """H W_down of Eq. 2, `[tokens, rank]`, and the three other weights, in H's dtype whatever autocast prefers."""
    down, *others = _rounded(weights, hidden_states.dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return [hidden_states.reshape(-1, hidden_states.shape[-1]) @ down.T, *others]


def _rounded(weights: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The weights in `dtype`, dense: float32 ones under 16-bit activations are rounded by one launch for all."""
    others = [w for w in weights if w is not None and (w.dtype != dtype or not w.is_contiguous())]
    if not others:
        return list(weights)
    copies = [torch.empty_like(w, dtype=dtype, memory_format=torch.contiguous_format) for w in others]
    torch._foreach_copy_(copies, others)
    copy_of = {id(w): copy for w, copy in zip(others, copies, strict=True)}
    return [copy_of.get(id(w), w) for w in weights]


def fits_one_launch(q: Tensor, up: Tensor) -> bool:
    """Whether a program holds what the kernels keep: a latent and a head's tile of a weight, for the tensor cores.

    The interpreter has no registers and runs every dtype in one launch.
    """
    rank, low_pairs = up.shape[1], up.shape[0] // q.shape[1] // 2
    tile = max(MIN_DOT, next_power_of_2(low_pairs)) * max(MIN_DOT, next_power_of_2(rank))
    on_tensor_cores = q.element_size() <= ONE_LAUNCH_BYTES or not q.is_cuda
    return rank <= MAX_RANK and tile <= MAX_WEIGHT_TILE and on_tensor_cores


def roae_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, hidden_states: Tensor,
    down: Tensor, up: Tensor, gqa_down: Tensor | None, gqa_up: Tensor | None, alpha: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rosa_kernels.roae` in one launch, its arguments checked, H in q's dtype, cos and sin with one column a pair."""
    weights = (down, up, gqa_down, gqa_up)
    refuse_forward_mode("roae", q, k, cos, sin, hidden_states, *weights)
    if torch.is_grad_enabled():
        return _RoAE.apply(q, k, cos, sin, hidden_states, *weights, alpha, interleaved)
    latent, *weights = _project_down(hidden_states, *weights)
    return torch.ops.rosa.roae_forward(q, k, cos, sin, latent, *weights, alpha, interleaved, False)[:2]
