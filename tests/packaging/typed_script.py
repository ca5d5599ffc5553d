"""A user's script, for the type checker alone: what it says of rosa's functions must hold."""

import torch
from torch import Tensor, nn

import rosa
import rosa_kernels
from rosa import AdapterError, DynamicLayerSelection, RoadConfig, RosaConfig, Selection


def train(model: nn.Module, batches: list[dict[str, Tensor]], folder: str) -> list[Selection]:
    patched: nn.Module = rosa.patch(model, RosaConfig(r_low=0.5, rank=64))
    trainable, total, percent = rosa.count_parameters(patched)
    print(f"{trainable} of {total}: {percent:.2f} %")
    optimizer = DynamicLayerSelection(
        torch.optim.AdamW(rosa.trainable_parameters(patched), lr=1e-3), patched, k_ratio=0.5
    )
    for batch in batches:
        patched(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rosa.save_adapter(patched, folder)
    layers: tuple[int, ...] = optimizer.selected_layers
    print(optimizer.interval + optimizer.k, layers)
    return optimizer.history


def switch(model: nn.Module, folder: str) -> str:
    rosa.patch(model, RoadConfig(variant=2), adapter_name="first")
    try:
        rosa.load_adapter(model, folder, "second")
    except AdapterError as error:
        print(error)
    rosa.set_adapter(model, "first")
    with rosa.disabled(model), torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    with rosa.adapters_by_row(model, ["first", None]):
        model(torch.zeros(2, 4, dtype=torch.long))
    rosa.unmerge(rosa.merge(model))
    return rosa.active_adapter(model)


def kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, signal: Tensor) -> Tensor:
    query, key = rosa_kernels.rope_roae(q, k, cos, sin, signal, alpha=0.1)
    return query @ key.mT
