"""Counts what a process hands to collectives, DDP's reducer and FSDP2 included."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Which argument holds the payload: what is reduced, scattered or sent to all.
PAYLOADS = {
    "allreduce_": 0,
    "broadcast_": 0,
    "allgather_": 0,
    "_allgather_base_": 0,
    "_reduce_scatter_base_": 1,
    "all_reduce": 0,  # the last three are of torch.distributed's functional collectives, which DTensor uses
    "all_gather_into_tensor": None,  # the result is
    "reduce_scatter_tensor": 0,
}
NO_PAYLOAD = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """While it is active, adds up the payloads of this process's collectives.

    An all-gather's payload is what every rank has in the end, a reduce-scatter's what every rank brings.

    Attributes:
        bytes (Counter): payload bytes by operation, such as "allreduce_" of the namespace `c10d`.
    """

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if function.namespace in ("c10d", "_c10d_functional") and name not in NO_PAYLOAD:
            if name not in PAYLOADS:
                raise NotImplementedError(f"the payload of {function} is not known")
            argument = PAYLOADS[name]
            self.bytes[name] += _bytes(result if argument is None else args[argument])
        return result


def _bytes(payload: Tensor | list) -> int:
    return payload.nbytes if isinstance(payload, torch.Tensor) else sum(map(_bytes, payload))
