"""`adapters_by_row`: different adapters in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rosa.adapters.config import RoadConfig, RosaConfig
from rosa.adapters.record import Adapter, patched
from rosa.adapters.road import Road, RopeRoad, wrapped_since
from rosa.adapters.roae import RoAE
from rosa.adapters.row_modules import BY_ROW, NormByRow
from rosa.adapters.rows import Rows
from rosa.errors import UnsupportedModelError
from rosa.models.decoder import decoder_layers

# What adapters of one kind must have in common: one launch computes all of them.
COMMON = {RosaConfig: ("r_low", "alpha", "rank"), RoadConfig: ("variant", "pairing")}


@contextmanager
def adapters_by_row(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[nn.Module]:
    """A block in which each row of the batch has its own adapter, at the launches of one.

    Each row computes what its adapter alone would, whichever is active. In `generate`, rows repeat with their beams and
    with the sequences that are returned. In training, each adapter gets the gradients of its rows: build its optimizer
    while it is active, as ever, and step it after the block (without trained norms, inside too). Backward belongs
    inside the block. RoAd's adapters must agree in variant and pairing, RoSA's in r_low, alpha and rank; layers and
    targets may differ, and both kinds may meet in one batch. RoSA's weights are held once a row.

    Args:
        model (nn.Module): a patched model, wrapped or not, but for DistributedDataParallel.
        adapter_names (sequence of str or None): for each row the name of an adapter of the model, or None for the base.

    Yields:
        The same model.

    Raises:
        TypeError: `adapter_names` is one string.
        KeyError: the model has no such adapter.
        ValueError: the model is not patched, is sharded or merged, is inside `disabled` or another such block, there
            are no rows, the adapters cannot share a batch, or what they stand in was replaced or copied. In the block,
            a batch that is no multiple of the rows.
        UnsupportedModelError: a norm that the adapters train cannot have a weight for each row, or a module that they
            adapt is offloaded; in the block, a layer that computes tokens without their rows.
        After an error, in the block too, the model is as before.
    """
    record = patched(model)[1]
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names must be a sequence with a name or None for each row, got {adapter_names!r}")
    rows = Rows(adapter_names)
    if not rows.names:
        raise ValueError("adapter_names is empty: name an adapter, or None for the base, for each row of the batch")
    adapters = {name: record.adapter(name) for name in rows.adapters}
    record.check_switchable(model)
    _refuse_data_parallel(model)
    _refuse_offloaded(adapters)
    _check_common(adapters)
    _check_hosts(adapters)
    _refuse_wrapped(adapters)
    with ExitStack() as undo:
        with torch.inference_mode(False):  # what is made there cannot tell whether it was written to
            for adapter in adapters.values():
                adapter.move()
            undo.enter_context(record.active_adapter.silenced())
            _put_in(patched(model)[0], rows, adapters, undo)
        record.rows = rows.names
        undo.callback(setattr, record, "rows", None)
        yield model


def _put_in(model: nn.Module, rows: Rows, adapters: Mapping[str, Adapter], undo: ExitStack) -> None:
    """Puts what computes by rows into a model that is its base, and on `undo` what takes it out again."""
    norms = _norms(rows, adapters, undo)  # all that can fail
    for host, child, module in _modules(rows, adapters):
        host.add_module(child, module.train(host.training))
        undo.callback(delattr, host, child)
    for norm, forward in norms:
        undo.callback(_set_forward, norm, norm.__dict__.get("forward"))
        _set_forward(norm, forward)
    for layer in decoder_layers(model):
        undo.callback(layer.module.register_forward_pre_hook(rows.watch, with_kwargs=True).remove)


def _modules(rows: Rows, adapters: Mapping[str, Adapter]) -> list[tuple[nn.Module, str, nn.Module]]:
    """The modules by row, each behind the one that it goes into and its name there."""
    hosts = {
        (name, type(module)): adapter.hosts[name]
        for adapter in adapters.values()
        for name, module in adapter.modules.items()
    }
    both_rotate = {RoAE, RopeRoad} <= {kind for _, kind in hosts}
    made = []
    for (name, kind), host in hosts.items():
        if both_rotate and kind is RopeRoad:
            continue
        own = [adapter.modules.get(name) for adapter in adapters.values()]
        module = BY_ROW[kind](rows, [m if isinstance(m, kind) else None for m in own])
        if both_rotate and kind is Road:
            module.before_rope = False
        made.append((host, kind.CHILD, module))
    return made


def _norms(rows: Rows, adapters: Mapping[str, Adapter], undo: ExitStack) -> list[tuple[nn.Module, NormByRow]]:
    """The norms that adapters train, each with its forward by row. The gradients that they get in the block go to the
    adapters when it ends."""
    trained = {name: norm for adapter in adapters.values() for name, norm in adapter.norms.items()}
    made = []
    for name, norm in trained.items():
        weights = {
            key: _leaf(adapter, name, norm, undo) for key, adapter in adapters.items() if name in adapter.weights
        }
        base = norm.weight.detach()
        made.append((norm, NormByRow(rows, norm, [weights.get(row, base) for row in rows.names])))
    return made


def _leaf(adapter: Adapter, name: str, norm: nn.Module, undo: ExitStack) -> Tensor:
    """An adapter's weight for a norm, which is no parameter while the norm holds the base's."""
    rests = adapter.weights[name]
    leaf = rests.data.detach().to(norm.weight.device).requires_grad_(rests.requires_grad)
    leaf.grad = None if rests.grad is None else rests.grad.to(leaf.device)

    def keep() -> None:
        adapter.weights[name] = rests._replace(grad=leaf.grad)

    undo.callback(keep)
    return leaf


def _set_forward(norm: nn.Module, forward: object) -> None:
    """Gives the module a forward of its own, or its class's again."""
    if forward is None:
        del norm.forward
    else:
        norm.forward = forward


def _check_common(adapters: Mapping[str, Adapter]) -> None:
    for kind, fields in COMMON.items():
        alike = {name: adapter.config for name, adapter in adapters.items() if type(adapter.config) is kind}
        for name, config in alike.items():
            first = next(iter(alike))
            for field in fields:
                value, expected = getattr(config, field), getattr(alike[first], field)
                if value != expected:
                    raise ValueError(
                        f"the adapters {first!r} and {name!r} cannot share a batch: {field} is {expected!r} in "
                        f"{first!r} and {value!r} in {name!r}. Give their rows to the model in batches of their own"
                    )


def _check_hosts(adapters: Mapping[str, Adapter]) -> None:
    """Adapters from before LoRA was put around a layer and from after stand in different modules there."""
    first: dict[str, str] = {}
    for key, adapter in adapters.items():
        for name, host in adapter.hosts.items():
            other = first.setdefault(name, key)
            if adapters[other].hosts[name] is not host:
                raise ValueError(
                    f"the adapters {other!r} and {key!r} cannot share a batch: something was put around {name} between "
                    "the two. Give their rows to the model in batches of their own"
                )


def _refuse_wrapped(adapters: Mapping[str, Adapter]) -> None:
    """Beside RoSA's, RoAd's adapters do without the launch with RoPE, and with what that alone would turn."""
    wrapped = next(filter(None, (wrapped_since(a.modules, a.hosts) for a in adapters.values())), None)
    if wrapped is not None and len({type(adapter.config) for adapter in adapters.values()}) > 1:
        raise ValueError(
            f"RoSA's and RoAd's adapters cannot share a batch: {wrapped} was wrapped since it has RoAd, by LoRA of "
            "PEFT for example, which RoAd turns too where RoPE follows at once, but not beside RoSA. Give their rows "
            "to the model in batches of their own"
        )


def _refuse_data_parallel(model: nn.Module) -> None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel averages the gradients of the active adapter alone, and here others get some too: "
            "train one adapter at a time, or patch the model without it"
        )


def _refuse_offloaded(adapters: Mapping[str, Adapter]) -> None:
    hosts = {name: host for adapter in adapters.values() for name, host in adapter.hosts.items()}
    name = next((name for name, host in hosts.items() if any(p.is_meta for p in host.parameters())), None)
    if name is not None:
        raise UnsupportedModelError(
            f"{name} is offloaded or on the meta device, where the weights of several adapters cannot be put together: "
            "use rosa.adapters_by_row with a model in memory, or one adapter at a time"
        )
