"""What PyTorch's engines for several processes, DDP and FSDP2, ask of layer selection."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rosa.models.sharding import whole


class Engine:
    """No engine: the process trains alone, or its gradients are reduced by the user."""

    groups: tuple[dist.ProcessGroup, ...] = ()  # over which all ranks select alike, one after the other
    ranks_agree = False  # whether their options have been found equal

    def obstacle(self) -> str | None:
        """Why layers cannot be frozen under this engine, or None where they can."""
        return None

    def check_layer(self, parameters: list[nn.Parameter]) -> None:
        """Raises ValueError if the engine cannot reduce the gradients of these parameters of one layer together."""

    def flags_changed(self) -> None:
        """Called when other parameters than before require gradients, between two steps."""

    def extent(self, groups: list[dict[str, Any]]) -> tuple[bool, bool]:
        """Whether a call of the optimizer with these param groups begins a step, and whether it ends it."""
        return True, True

    def step(self, optimizer: torch.optim.Optimizer, selected: tuple[int, ...]) -> None:
        """Steps the optimizer; the gradients of layers that are not selected are None."""
        optimizer.step()

    def drop(self, parameter: nn.Parameter) -> None:
        """Takes away a gradient that backward has just computed."""
        parameter.grad = None

    def saw_backward(self, parameters: list[nn.Parameter]) -> bool:
        """Whether any of the parameters has a gradient on this rank."""
        return any(parameter.grad is not None for parameter in parameters)

    def squared_norm(self, parameter: nn.Parameter) -> Tensor | None:
        """The squared L2 norm of the parameter's whole gradient, a float32 scalar; None where there is none."""
        return None if parameter.grad is None else whole(parameter.grad.float().square().sum())

    def reduce_unmanaged(self, parameters: list[nn.Parameter]) -> None:
        """Averages gradients of parameters that the engine may not know, since they do not always require them."""

    def first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        box = [value]
        for group in self.groups:
            dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    def check_equal(self, options: dict[str, Any]) -> None:
        """Raises ValueError, on every rank, if the ranks' options differ."""
        for group in self.groups:
            everyone: list[dict[str, Any]] = [{}] * group.size()
            dist.all_gather_object(everyone, options, group=group)
            for name in options:
                values = [theirs[name] for theirs in everyone]
                if any(value != values[0] for value in values):
                    raise ValueError(
                        f"layer selection needs the same {name} on every rank, got {', '.join(map(str, values))}"
                    )


class DDP(Engine):
    """`DistributedDataParallel`: whole gradients, averaged by a reducer over the parameters that required them when the
    reducer was built."""

    def __init__(self, ddp: DistributedDataParallel):
        self.ddp = ddp

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        return (self.ddp.process_group,)

    def check_equal(self, options: dict[str, Any]) -> None:
        if self.ddp._join_config.enable:
            raise RuntimeError(
                "layer selection cannot run under DistributedDataParallel.join(): a rank without data would take no "
                "part in the selections; give every rank as many batches"
            )
        super().check_equal(options)

    def obstacle(self) -> str | None:
        if self.ddp.static_graph:
            return "DistributedDataParallel with static_graph=True keeps the graph of its first step"
        if self.ddp.mixed_precision is not None:
            return "DistributedDataParallel with mixed_precision keeps hooks on the parameters that it first saw"
        if self.ddp._delay_all_reduce_params:
            return "DistributedDataParallel with delay_all_reduce_named_params reduces them in one parameter's hook"
        if any(not isinstance(state, dist.ProcessGroup | None) for _, state in self.ddp._comm_hooks):
            return "a DDP communication hook with a state of its own may keep it by bucket"
        return None

    def flags_changed(self) -> None:
        """Builds the reducer anew over the parameters that require gradients now, so that no others are reduced. The
        old reducer takes its hooks with it. This is DDP's own way to get a reducer after it was unpickled."""
        hooks, self.ddp._comm_hooks = self.ddp._comm_hooks, []
        self.ddp.__setstate__({"process_group": self.ddp.process_group})
        for hook, state in hooks:
            self.ddp.register_comm_hook(state, hook)

    def reduce_unmanaged(self, parameters: list[nn.Parameter]) -> None:
        average_gradients(parameters, self.ddp.process_group)


class FSDP2(Engine):
    """`fully_shard`: gathers a layer's parameters before it runs and takes each one's requires_grad along."""

    def __init__(self, parameter: DTensor):
        mesh = parameter.device_mesh
        self.groups = tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim))

    def check_layer(self, parameters: list[nn.Parameter]) -> None:
        dtypes = {p.dtype for p in parameters}
        if len(dtypes) > 1:
            raise ValueError(
                f"FSDP2 reduces a layer's gradients in one dtype, and these are of {', '.join(map(str, dtypes))}: rank "
                "layers with score='adapter', or keep the norms in the dtype of the parameters that are trained"
            )


def engine_of(model: nn.Module, parameter: nn.Parameter) -> Engine | None:
    """The engine that shows in the model or, `parameter` being one of its own, in how that is kept."""
    ddp = next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
    if ddp is not None:
        return DDP(ddp)
    return FSDP2(parameter) if isinstance(parameter, DTensor) else None


def running_ddp() -> DistributedDataParallel | None:
    """The DDP module whose forward is running."""
    return DistributedDataParallel._get_active_ddp_module() if dist.is_available() and dist.is_initialized() else None


def average_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Averages whole gradients over the ranks of the group."""
    for parameter in parameters:
        if parameter.grad is None:  # this rank did not use it, another may have
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= group.size()
