"""Different adapters in one batch: the ways to do it, and what each launches for a decoded token, on any machine.

Eight requests in one batch, one or eight adapters among them, all linear layers adapted by RoAd and LoRA; bfloat16, a
cache. Launches are those of one decoder layer for one more token of all requests, counted as `benchmarks.static` counts
them: a model of two layers less one of a single layer. `python -m benchmarks.mixed_batch` prints the table, and with
`--save` keeps its rows. Adapters are of the base's dtype where peft's mixed batch does not run with others.
"""

from __future__ import annotations

import argparse
import os

if __name__ == "__main__":
    # The launches are counted, and none takes place: no GPU is needed for the kernels to be chosen.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ROSA_BACKEND", "triton")

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

import rosa
from benchmarks.results import MIXED, environment, write
from benchmarks.static import Launches

REQUESTS = 8
ADAPTERS = (1, 8)
RANK = 16  # of LoRA
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = dict(vocab_size=16, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)


class Mixed(NamedTuple):
    """A model whose requests have adapters of their own, inside `block` and called with `options`."""

    model: nn.Module
    block: AbstractContextManager
    options: dict[str, Any]


def base(model: nn.Module, names: list[str]) -> Mixed:
    """No adapter."""
    return Mixed(model, nullcontext(), {})


def ours(config: rosa.RosaConfig | rosa.RoadConfig) -> Callable[[nn.Module, list[str]], Mixed]:
    """RoAd or RoSA of this package, with adapters in float32."""

    def adapt(model: nn.Module, names: list[str]) -> Mixed:
        for name in dict.fromkeys(names):
            rosa.patch(model, config, name)
        return Mixed(model, rosa.adapters_by_row(model, names), {})

    return adapt


def peft_mixed(config: Callable[[], peft.PeftConfig]) -> Callable[[nn.Module, list[str]], Mixed]:
    """peft's mixed batch, `adapter_names=`."""

    def adapt(model: nn.Module, names: list[str]) -> Mixed:
        first, *others = dict.fromkeys(names)
        model = peft.get_peft_model(model, config(), first, autocast_adapter_dtype=False)
        for name in others:
            model.add_adapter(name, config())
        return Mixed(model.to(model.dtype).eval(), nullcontext(), {"adapter_names": names})

    return adapt


def lora_bmm(model: nn.Module, names: list[str]) -> Mixed:
    """LoRA as plain batched products, with each request's weights gathered beforehand."""
    adapters = list(dict.fromkeys(names))
    index = torch.tensor([adapters.index(name) for name in names], device=model.device)

    def add(linear: nn.Linear, down: Tensor, up: Tensor) -> None:
        linear.register_forward_hook(lambda module, args, out: torch.baddbmm(out, torch.bmm(args[0], down), up))

    for name, linear in model.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            new = dict(dtype=linear.weight.dtype, device=linear.weight.device)
            down = torch.randn(len(adapters), linear.in_features, RANK, **new) / linear.in_features
            add(linear, down[index], torch.zeros(len(adapters), RANK, linear.out_features, **new)[index])
    return Mixed(model, nullcontext(), {})


METHODS: dict[str, Callable[[nn.Module, list[str]], Mixed]] = {
    "base": base,
    "RoAd": ours(rosa.RoadConfig()),
    "RoSA": ours(rosa.RosaConfig()),
    "RoAd (peft)": peft_mixed(
        lambda: peft.RoadConfig(variant="road_2", group_size=2, target_modules=LINEARS, task_type="CAUSAL_LM")
    ),
    "LoRA (peft)": peft_mixed(lambda: peft.LoraConfig(r=RANK, target_modules=LINEARS, task_type="CAUSAL_LM")),
    "LoRA by torch.bmm": lora_bmm,
}


def requests(adapters: int) -> list[str]:
    """The adapter of each request."""
    return [f"adapter_{request % adapters}" for request in range(REQUESTS)]


def launches(method: str, adapters: int) -> int:
    """Launches of a decoder layer for one more token of all requests."""
    one, two = (_launches(method, adapters, layers) for layers in (1, 2))
    return two - one


@torch.no_grad()
def _launches(method: str, adapters: int, layers: int) -> int:
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, num_hidden_layers=layers, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model, block, options = METHODS[method](model, requests(adapters))
    ids = torch.ones(REQUESTS, 1, dtype=torch.long)
    with block:
        cache = model(input_ids=ids, use_cache=True, **options).past_key_values  # the prompt; what is made once is made
        with Launches() as counted:
            model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
    return counted.count


def main() -> None:
    """Prints the table, measured as it runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_batch", description=main.__doc__)
    parser.add_argument("--save", action="store_true", help=f"keep the rows in {MIXED}")
    save = parser.parse_args().save
    rows = []
    print(f"{'launches a layer and decoded token':36}" + "".join(f"{n:4} adapter{'s' * (n > 1)}" for n in ADAPTERS))
    for method in METHODS:
        counts = [launches(method, adapters) for adapters in ADAPTERS]
        print(f"{method:36}" + "".join(f"{count:{12 + (n > 1)}}" for n, count in zip(ADAPTERS, counts, strict=True)))
        for adapters, count in zip(ADAPTERS, counts, strict=True):
            labels = dict(group="mixed_batch_counted", provider=method, mode="decode", shape="Qwen2, small")
            rows.append({**labels, "batch": REQUESTS, "seq": 1, "adapters": adapters, "launches": count})
    if save:
        write(MIXED, environment(), rows)
    print(f"{REQUESTS} requests in one batch. Counted, not timed.")


if __name__ == "__main__":
    main()
