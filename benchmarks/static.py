"""Counts what a decoder layer costs, on any machine: kernel launches and bytes saved for backward.

One decoder layer of Qwen2.5-7B shape, bfloat16, sdpa, one pass forward and backward. Launches are operators that
compute (views are not counted; a Triton launch counts as one). Saved bytes are those that every further token adds,
every storage once; what does not grow with the tokens, such as a cast copy of a weight, stands apart. Decoding is
one more token behind a cache, adapters unmerged.
`python -m benchmarks.static` prints the table, and with `--save` keeps its rows for the report.
"""

from __future__ import annotations

import argparse
import functools
import os

if __name__ == "__main__":
    # The launches are counted, and none takes place: no GPU is needed for the kernels to be chosen.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ROSA_BACKEND", "triton")

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, RoadConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, DynamicCache, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, apply_rotary_pos_emb

import rosa
from benchmarks import liger
from benchmarks.providers import enhance
from benchmarks.results import COUNTED, environment, write
from rosa.training.memory import saved_bytes

TOKENS = (16, 32)  # the cost of a token is the difference
SHAPE = dict(
    vocab_size=8, hidden_size=3584, intermediate_size=18944, num_hidden_layers=1, num_attention_heads=28,
    num_key_value_heads=4, attn_implementation="sdpa",
)  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Operators that launch nothing although they are no views of their inputs; `lift_fresh` hands on a tensor that was made
# of Python's numbers, and `device` is the question for a tensor's.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "device", "lift_fresh"}


class Cost(NamedTuple):
    """Launches of one forward and one backward pass, and of one more token decoded; bytes saved for backward per token,
    and beside the tokens."""

    forward: int
    backward: int
    decode: int
    saved_per_token: int
    saved_besides: int


class Launches(TorchDispatchMode):
    """Counts the operators that compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name.rpartition("::")[2] not in FREE and not _is_view(out, args):
            self.count += 1
        return out


def _is_view(out: object, args: tuple) -> bool:
    """Whether the operator only gave its first argument, or parts of it, another shape."""
    if not (args and isinstance(args[0], Tensor)):
        return False
    storage = args[0].untyped_storage()._cdata
    found = out if isinstance(out, (list, tuple)) else [out]
    return bool(found) and all(
        isinstance(one, Tensor) and one is not args[0] and one.untyped_storage()._cdata == storage for one in found
    )


def forward(layer: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """One pass through a decoder layer: its output, and the bytes that its graph saves, parameters aside.

    Args:
        layer (nn.Module): a decoder layer of transformers.
        hidden_states (Tensor): its input `[batch, seq, hidden_size]`, which requires gradients.
        position_embeddings (tuple of Tensor): cos and sin `[1, seq, head_dim]`.
    """
    return saved_bytes(
        layer, lambda: layer(hidden_states, position_embeddings=position_embeddings, attention_mask=None)
    )


def measure(
    layer: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[int, int, int]:
    """Launches forward, launches backward and bytes saved of one pass; the arguments are those of `forward`."""
    with liger.counted_launches(), Launches() as there:
        out, saved_bytes = forward(layer, hidden_states, position_embeddings)
    direction = torch.ones_like(out)
    with liger.counted_launches(), Launches() as back:
        out.backward(direction)
    return there.count, back.count, saved_bytes


@torch.no_grad()
def decoded(model: Qwen2Model) -> int:
    """Launches of the first decoder layer for one more token behind a cache, in a model in evaluation mode."""
    cache = DynamicCache(config=model.config)
    for start, tokens in ((0, TOKENS[0]), (TOKENS[0], 1)):  # what is made once is made with the prompt
        hidden_states = torch.empty(1, tokens, model.config.hidden_size, dtype=model.dtype)
        rotary = model.rotary_emb(hidden_states, torch.arange(start, start + tokens)[None])
        with liger.counted_launches(), Launches() as counted:
            model.layers[0](
                hidden_states, position_embeddings=rotary, attention_mask=None, past_key_values=cache, use_cache=True
            )
    return counted.count


def frozen(model: Qwen2Model) -> None:
    """No adapter; only the layer's input needs gradients."""


def frozen_with_one_launch_of_rope(model: Qwen2Model) -> None:
    """The frozen layer, RoPE in one launch; RoAd of the queries alone is in it, costs none, and is frozen too."""
    rosa.patch(model, rosa.RoadConfig(targets=("q_proj",)))
    model.requires_grad_(False)


def rosa_fused(model: Qwen2Model, **config: object) -> None:
    """RoSA as this package does it."""
    rosa.patch(model, rosa.RosaConfig(**config))


def rosa_frozen_by_dls(model: Qwen2Model) -> None:
    """RoSA in a layer that layer selection has frozen: its adapter is applied and passes gradients to its input."""
    rosa_fused(model)
    model.requires_grad_(False)


def rosa_naive(model: Qwen2Model) -> None:
    """RoSA written operation by operation, in the base's dtype."""
    rosa_fused(model, adapter_dtype=str(model.dtype).removeprefix("torch."))
    for layer in model.layers:
        layer.self_attn.roae.forward = _naive_forward.__get__(layer.self_attn.roae)


def _naive_forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, hidden_states: Tensor):
    S = F.silu(F.linear(F.linear(hidden_states, self.down), self.up))
    S_K = F.linear(F.linear(S, self.gqa_down), self.gqa_up)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return enhance(q, S), enhance(k, S_K)


def peft_lora(model: Qwen2Model, dora: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    """LoRA of peft, r=16 on all linear layers, without dropout; in the base's dtype, where `get_peft_model` would leave
    it in float32: it launches and keeps less so."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, use_dora=dora)
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    _cast(model, "lora_", dtype)


def road(model: Qwen2Model, variant: int) -> None:
    """RoAd as this package does it, on all linear layers."""
    rosa.patch(model, rosa.RoadConfig(variant=variant))


def peft_road(model: Qwen2Model, variant: int, dtype: torch.dtype = torch.float32) -> None:
    """RoAd of peft on all linear layers, in float32 as its `get_peft_model` leaves it, and as ours is."""
    model.requires_grad_(False)
    inject_adapter_in_model(RoadConfig(variant=f"road_{variant}", target_modules=LINEARS), model)
    _cast(model, "road_", dtype)


def with_liger(adapt: Callable[[Qwen2Model], None]) -> Callable[[Qwen2Model], None]:
    """The same with Liger's RMSNorm and SwiGLU."""

    def adapted(model: Qwen2Model) -> None:
        liger.norms_and_swiglu(model)
        adapt(model)

    return adapted


def _cast(model: Qwen2Model, name: str, dtype: torch.dtype) -> None:
    for own, parameter in model.named_parameters():
        if name in own:
            parameter.data = parameter.data.to(dtype)


LAYERS: dict[str, Callable[[Qwen2Model], None]] = {
    "frozen (no adapter)": frozen,
    "frozen, RoPE in one launch": frozen_with_one_launch_of_rope,
    "RoSA, naive PyTorch": rosa_naive,
    "RoSA": rosa_fused,
    "RoSA, bfloat16 adapter": lambda model: rosa_fused(model, adapter_dtype="bfloat16"),
    "RoSA, frozen by DLS": rosa_frozen_by_dls,
    "LoRA r=16, all linears (peft)": peft_lora,
    "LoRA r=16, float32 adapter (peft)": functools.partial(peft_lora, dtype=torch.float32),
    "DoRA r=16, all linears (peft)": functools.partial(peft_lora, dora=True),
    **{f"RoAd_{n}, all linears": functools.partial(road, variant=n) for n in (1, 2, 4)},
    **{f"RoAd_{n}, all linears (peft)": functools.partial(peft_road, variant=n) for n in (1, 2, 4)},
    "RoAd_2, bfloat16 adapter (peft)": functools.partial(peft_road, variant=2, dtype=torch.bfloat16),
}
if liger.INSTALLED:
    LAYERS |= {
        f"{name}{liger.LIGER}": with_liger(LAYERS[name])
        for name in (
            "frozen (no adapter)",
            "RoSA",
            "RoSA, frozen by DLS",
            "LoRA r=16, all linears (peft)",
            # RoAd_1 keeps its output, which Liger's SwiGLU overwrites: it is refused there.
            "RoAd_2, all linears",
            "RoAd_2, all linears (peft)",
        )
    }


def cost(adapt: Callable[[Qwen2Model], None]) -> Cost:
    """The cost of a layer of Qwen2.5-7B shape after `adapt`."""
    with torch.device("meta"):
        model = AutoModel.from_config(Qwen2Config(**SHAPE), dtype=torch.bfloat16).requires_grad_(False).train()
        adapt(model)
    # Tensors without numbers: the same operators, and no arithmetic.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        passes = [_pass(model, tokens) for tokens in TOKENS]
        decode = decoded(model.eval())
    (there, back, few), (_, _, many) = passes
    per_token = (many - few) // (TOKENS[1] - TOKENS[0])
    return Cost(there, back, decode, per_token, few - per_token * TOKENS[0])


def _pass(model: Qwen2Model, tokens: int) -> tuple[int, int, int]:
    hidden_states = torch.empty(1, tokens, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = model.rotary_emb(hidden_states, torch.arange(tokens)[None])
    model.zero_grad()
    return measure(model.layers[0], hidden_states, rotary)


def main() -> None:
    """Prints the table, measured as it runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=main.__doc__)
    parser.add_argument("--save", action="store_true", help=f"keep the rows in {COUNTED}")
    save = parser.parse_args().save
    rows = []
    print(f"{'layer':56} {'forward':>8} {'backward':>9} {'decode':>7} {'saved a token':>14} {'besides':>12}")
    for name, adapt in LAYERS.items():
        c = cost(adapt)
        print(f"{name:56} {c.forward:8} {c.backward:9} {c.decode:7} {c.saved_per_token:14,} {c.saved_besides:12,}")
        labels = dict(group="counted", provider=name, mode="both", shape="Qwen2.5-7B", batch=1, seq=TOKENS[0])
        rows.append({**labels, **c._asdict()})
    if save:
        write(COUNTED, environment(), rows)
    print("launches of a decoder layer of Qwen2.5-7B shape, one pass and one decoded token; bytes saved for backward.")
    print("Counted, not timed.")


if __name__ == "__main__":
    main()
