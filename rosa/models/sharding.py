"""Weights of which every process has a part: FSDP2's DTensors, and what DeepSpeed's ZeRO-3 has partitioned.

FSDP2 gives every rank a shard of each parameter, of its gradient and of the optimizer's state (a DTensor). `whole`,
`gathered` and the functions that use them are collective: every rank calls them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed's ZeRO-3 spreads the parameters over several processes."""
    fsdp = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    # Of a module inside a sharded one, the parameters alone tell; ZeRO-3 marks them with `ds_id`.
    return fsdp or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def check_not_sharded(model: nn.Module) -> None:
    """Raises ValueError where the parameters are spread over several processes."""
    if is_sharded(model):
        raise ValueError(
            f"this {type(model).__name__} is sharded over several processes, where adapters cannot be switched: do it "
            "before the model is sharded, or use a second model"
        )


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which every rank has a shard; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that is shared out; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a tensor that every rank has whole, where the parameter is sharded; else the tensor."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with whole tensors, as it would be in a single process."""
    states = {i: _map(whole, state) for i, state in state_dict["state"].items()}
    return {**state_dict, "state": states}


def shard_state(state_dict: dict[str, Any], parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state, whole on every rank, shared out as its parameters are.

    Args:
        state_dict (dict): of an optimizer over as many parameters.
        parameters (iterable of Parameter): the optimizer's, in order.
    """
    numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
    placed = dict(zip(numbers, parameters, strict=False))

    def shard(value: Tensor, parameter: nn.Parameter) -> Tensor:  # but a step count, for example, every rank has
        return shard_like(value, parameter) if value.shape == parameter.shape else value

    states = {i: _map(lambda v, p=placed[i]: shard(v, p), state) for i, state in state_dict["state"].items()}
    return {**state_dict, "state": states}


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has left each rank a part of the parameter, and nothing in its place."""
    return hasattr(parameter, "ds_id")


def is_managed(parameter: nn.Parameter) -> bool:
    """Whether ZeRO of any stage has a copy of the parameter that it trains in the parameter's stead."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager:
    """Has partitioned parameters whole, to be read, for the time of the block. Every rank calls it."""
    if not any(map(is_partitioned, parameters)):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _map(function: Any, state: dict[str, Any]) -> dict[str, Any]:
    return {name: function(value) if isinstance(value, Tensor) else value for name, value in state.items()}
