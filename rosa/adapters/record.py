"""What RoSA did to a model: its adapters, which of them is attached, and what it takes to undo it all.

Only the active adapter stands in the model. The others rest in the record, which is no module: neither the model's
parameters nor its state dict hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.adapters.config import AdapterConfig
from rosa.adapters.hosts import PART_OF, refuse_copied, refuse_replaced
from rosa.adapters.norm_weights import NormWeight, exchange, keep_dtype, trained_dtype, widened
from rosa.models.decoder import rotary_functions
from rosa.models.rotary import serve_adapters
from rosa.models.sharding import check_not_sharded

COMPOSED = "_rosa_composition"  # on a model that `rosa.compose` has rotations in, what it did


class Kept(NamedTuple):
    """A value of the base's, while `merge` has put another in its place."""

    module: nn.Module
    name: str  # of the parameter in the module
    data: Tensor


@dataclass
class Adapter:
    """One adapter of a model.

    Its modules, and the Parameters of the norms, are the same objects as long as it lives: an optimizer that holds them
    stays valid while other adapters are switched in.
    """

    config: AdapterConfig
    base: dict[str, int | str | bool]  # the shape of the model that it was made for
    hosts: dict[str, nn.Module]  # the modules of the model that have one of its own, by full name
    modules: dict[str, nn.Module]  # its own, by the names of their hosts, whose child CHILD each becomes
    norms: dict[str, nn.Module]  # that it trains, by the full names of their weights
    weights: dict[str, NormWeight]  # of these norms: the base's while it is attached, its own while it is not
    attached: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)  # on the norms that it widens
    dtype: torch.dtype | None = None  # of the model when it was attached

    def parameters(self) -> dict[str, nn.Parameter]:
        """What it trains, by full name. While it is not attached, the norms hold other values than its own."""
        return self._own() | {name: norm.weight for name, norm in self.norms.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What it has learned, by full name, attached or not."""
        norms = self.parameters() if self.attached else {name: weight.data for name, weight in self.weights.items()}
        return {name: tensor.detach() for name, tensor in (norms | self._own()).items()}

    def lacks_values(self) -> bool:
        """Whether any of that is on the meta device, as in models that are offloaded."""
        return any(tensor.is_meta for tensor in self.tensors().values())

    def move(self) -> None:
        """Moves its modules to the devices of their hosts."""
        for name, host in self.hosts.items():
            device = next(host.parameters()).device
            if device.type != "meta":
                self.modules[name].to(device)

    def attach(self) -> None:
        """Puts its modules and its norm weights into the model."""
        self._add_modules()
        self._exchange({n: w._replace(data=widened(self.norms[n], w.data)) for n, w in self.weights.items()})
        wide = [norm for name, norm in self.norms.items() if norm.weight.dtype != self.weights[name].data.dtype]
        self.hooks = [norm.register_forward_hook(keep_dtype, with_kwargs=True) for norm in wide]
        self.dtype = self._example().dtype

    def detach(self) -> None:
        """Takes them out again."""
        self._remove_hooks()
        self._exchange({n: w._replace(data=self._as_the_model(n, w.data)) for n, w in self.weights.items()})
        self._remove_modules()

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Takes it out for the time of the block. The norms keep their dtype, and so what DDP holds on to in them."""
        base, dtype, device = self.weights, self._example().dtype, self._example().device
        self._exchange({n: w._replace(data=w.data.to(self.norms[n].weight.dtype)) for n, w in base.items()})
        self._remove_modules()
        try:
            yield
        finally:
            if self._example().device != device:
                self.move()
            if self._example().dtype != dtype:  # the model was cast without it
                self._remove_hooks()
                self.attach()
            else:
                self._add_modules()
                self._exchange(self.weights)
                self.weights = base

    def check_norms_in_memory(self) -> None:
        """Raises ValueError where accelerate offloads norms that it trains: other values put there would be ignored."""
        for name, norm in self.norms.items():
            if norm.weight.is_meta and hasattr(norm, "_hf_hook"):
                raise ValueError(
                    f"{name} is offloaded to the CPU or to disk, and would go on with the value that it has there: "
                    "switch, disable or take off adapters that train norms before the model is offloaded"
                )

    def check_base_known(self) -> None:
        """Raises ValueError where the values that the norms had before are not known, or cannot be put back."""
        self.check_norms_in_memory()
        for name, norm in self.norms.items():
            if self.weights[name].data.is_meta and not norm.weight.is_meta:
                raise ValueError(
                    f"{name} had no value when the model was patched, on the meta device, so there is no base to "
                    "switch to: load the base's weights before rosa.patch, or use train_norms=False"
                )

    def _as_the_model(self, name: str, base: Tensor) -> Tensor:
        """The weight of the base's norm, in the dtype that the model was cast to since the adapter was attached."""
        norm = self.norms[name]
        cast = norm.weight.dtype != trained_dtype(norm, base.dtype, self.config.torch_dtype)
        # A widened norm is no wider where the model is cast to what it was widened to.
        cast = cast or self._example().dtype != self.dtype
        return base.to(norm.weight.dtype) if cast else base

    def _example(self) -> nn.Parameter:
        """A parameter of the model that no adapter trains, which tells its dtype and device."""
        return next(next(iter(self.hosts.values())).parameters())

    def _own(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{module.CHILD}.{weight}": parameter
            for name, module in self.modules.items()
            for weight, parameter in module.named_parameters()
        }

    def _remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _add_modules(self) -> None:
        for name, host in self.hosts.items():
            host.add_module(self.modules[name].CHILD, self.modules[name].train(host.training))
        self.attached = True

    def _remove_modules(self) -> None:
        for name, host in self.hosts.items():
            delattr(host, self.modules[name].CHILD)
        self.attached = False

    def _exchange(self, incoming: dict[str, NormWeight]) -> None:
        self.weights = {name: exchange(norm.weight, incoming[name]) for name, norm in self.norms.items()}


@dataclass
class Patch:
    """What `patch` did to a model, kept on it as `_rosa`."""

    owner: str  # the name of the model's class
    requires_grad: dict[str, bool]  # of every parameter, before
    prepare_process: Callable[[], None]  # for such a model, which takes it along when it is pickled
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None  # None until the first adapter is in
    hosts: list[tuple[str, nn.Module]] = field(default_factory=list)  # all with hooks that call their child, its name
    hooks: list[Any] = field(default_factory=list)  # on these: each can be removed
    marked: list[nn.Module] = field(default_factory=list)  # all that an adapter stood in or trained
    rows: tuple[str | None, ...] | None = None  # inside `adapters_by_row`: the adapter of each
    kept: list[Kept] = field(default_factory=list)  # empty unless the active adapter is merged

    @property
    def active_adapter(self) -> Adapter:
        return self.adapters[self.active]

    def adapter(self, name: str | None) -> Adapter:
        """The adapter of this name, or the active one.

        Raises:
            KeyError: there is none.
        """
        if name is None:
            return self.active_adapter
        if name not in self.adapters:
            raise KeyError(f"this model has no adapter {name!r}; it has {', '.join(self.adapters)}")
        return self.adapters[name]

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter and switches it in."""
        self.adapters[name] = adapter
        self.switch(name)
        known = {(child, id(host)) for child, host in self.hosts}
        pairs = [(module, adapter.hosts[key]) for key, module in adapter.modules.items()]
        new = [(module, host) for module, host in pairs if (module.CHILD, id(host)) not in known]
        for module, host in new:
            self.hooks += module.attach(host)
            self.hosts.append((module.CHILD, host))
        for module in (*adapter.hosts.values(), *adapter.norms.values()):
            module.__dict__[PART_OF] = self.owner  # not by setattr, which torch.compile's wrappers pass on
            self.marked.append(module)
        if new:  # torch.compile does not look again for hooks of a module that it made a graph of
            torch.compiler.reset()

    def switch(self, name: str) -> None:
        """Takes the active adapter out and puts another one in."""
        self.adapters[name].move()
        if self.active is not None:
            self.active_adapter.detach()
        self.active = name
        self.active_adapter.attach()

    def check_switchable(self, model: nn.Module) -> None:
        """Raises ValueError where the active adapter cannot be switched."""
        self.check_enabled()
        check_not_sharded(model)
        self.check_in_place(model, *self.adapters)
        self.active_adapter.check_base_known()
        for adapter in self.adapters.values():
            adapter.check_norms_in_memory()

    def check_in_place(self, model: nn.Module, *adapter_names: str | None) -> None:
        """Raises ValueError where the model has a copy of what an adapter stands in or trains, or no longer has what
        these adapters do."""
        owner = patched(model)[0]
        refuse_copied(owner, self.marked)
        for name in adapter_names:
            adapter = self.adapters[name]
            refuse_replaced(owner, name, adapter.hosts | adapter.norms)

    def check_unmerged(self) -> None:
        """Raises ValueError while the active adapter is merged into the model's weights."""
        if self.kept:
            raise ValueError(
                f"the adapter {self.active!r} is merged into the weights of this {self.owner}: call "
                "rosa.unmerge(model) first"
            )

    def check_enabled(self) -> None:
        """Raises ValueError inside `rosa.disabled` and `adapters_by_row`, and while the active adapter is merged."""
        self.check_not_by_row()
        self.check_unmerged()
        if not self.active_adapter.attached:
            raise ValueError("the adapters of this model cannot be changed inside `with rosa.disabled(model)`")

    def check_not_by_row(self) -> None:
        """Raises ValueError inside `rosa.adapters_by_row`."""
        if self.rows is not None:
            raise ValueError(
                "inside `with rosa.adapters_by_row(...)` the adapters of this model are those of its rows, and none is "
                "changed, deleted, disabled or given to other rows, nor the model saved: leave the block first"
            )

    def remove(self) -> None:
        """Takes the active adapter out, and all hooks and marks."""
        self.active_adapter.detach()
        for hook in self.hooks:
            hook.remove()
        for module in self.marked:
            module.__dict__.pop(PART_OF, None)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.prepare_process()  # one that unpickles a model may not have patched one yet
        for _, host in self.hosts:
            if rotary_functions(type(host)) is not None:
                serve_adapters(type(host))


def is_patched(model: nn.Module) -> bool:
    """Whether the model, a model that it wraps, or one that it is part of, carries RoSA."""
    return any("_rosa" in module.__dict__ or PART_OF in module.__dict__ for module in model.modules())


def patched(model: nn.Module) -> tuple[nn.Module, Patch]:
    """The patched model, which may stand inside wrappers such as DDP, and its record.

    Raises:
        ValueError: the model is not patched, or is only part of one that is, such as its trunk.
    """
    for module in model.modules():
        if "_rosa" in module.__dict__:
            return module, module._rosa
    owner = next((module.__dict__[PART_OF] for module in model.modules() if PART_OF in module.__dict__), None)
    if owner is not None:
        raise ValueError(
            f"this {type(model).__name__} has layers of a {owner} that rosa.patch has patched: call it with that "
            f"{owner}, or rosa.unpatch that first"
        )
    raise ValueError(f"this {type(model).__name__} is not patched; call rosa.patch(model) first")
