"""Trains tiny models under DDP or FSDP2, one job after the other. Run by torchrun: `worker.py FOLDER`, which holds
jobs.json; each rank leaves FOLDER/NAME-RANK.pt."""

import json
import sys
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rosa
from benchmarks.traffic import Traffic
from rosa.models.sharding import whole
from rosa.selection import freezing
from rosa.training.processes import leave_process_groups
from tests.rosa.conftest import make_model, make_patched

ROWS = 4  # of the global batch


def build(lora=False, low_precision_base=False, **changes):
    if low_precision_base:
        changes["dtype"] = torch.bfloat16
    config = rosa.RosaConfig(rank=4, adapter_dtype="float64")
    if not lora:
        return make_patched(config=config, dtype=torch.float64, **changes).train()
    model = make_model(**{"dtype": torch.float64} | changes)
    lora = LoraConfig(r=2, target_modules="all-linear")
    return get_peft_model(model, lora, autocast_adapter_dtype=low_precision_base).train()


def rows(step):
    return torch.randint(3, 96, (ROWS, 9), generator=torch.Generator().manual_seed(step))


def shard(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model, dls):
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    return rosa.DynamicLayerSelection(adamw, model, **{"interval": 5} | dls)


def no_sync(model, waits):
    if isinstance(model, DistributedDataParallel):
        return model.no_sync() if waits else nullcontext()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not waits)
    return nullcontext()


def train(model, optimizer, steps, *, rank=0, world=1, accumulate=1, clip=None, begin=0, plain_from=None, count=False):
    """Returns the bytes of each step by collective. From step `plain_from` on all layers train."""
    traffic = []
    for step in range(begin, steps):
        if step == plain_from:
            optimizer.unfreeze()
            optimizer = optimizer.optimizer
        with Traffic() if count else nullcontext() as counter:
            mine = rows(step)[rank::world].chunk(accumulate)
            for i, part in enumerate(mine):
                with no_sync(model, i + 1 < accumulate):
                    (model(input_ids=part, labels=part).loss / accumulate).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        traffic.append(dict(counter.bytes) if count else {})
    return traffic


def result(model, optimizer, traffic=()):
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    values = {name: whole(p.detach()).clone() for name, p in zip(names, model.parameters(), strict=True)}
    return {
        "values": {name: value for name, value in values.items() if "roae" in name or "norm" in name or "lora" in name},
        "base": sum(v.sum().item() for name, v in values.items() if "roae" not in name and "norm" not in name),
        "state": optimizer.state_dict(),
        "traffic": list(traffic),
    }


def run(
    engine, *, steps=50, dls=None, by_rank=({}, {}), wrap_first=True, resume=None, model=None, ddp=None, give="outer",
    hook=None, join=False, compiles=None, checkpoints=False, **training,
):  # fmt: skip
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    freezing._warn_once.cache_clear()
    dls = (dls or {}) | by_rank[rank]
    inner = build(**(model or {}))
    if resume:
        saved = torch.load(Path(sys.argv[1], resume), weights_only=True)
        inner.load_state_dict(saved["values"], strict=False)
    if checkpoints:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    if compiles == "layers":
        for layer in inner.model.layers:
            layer.compile(backend="eager")
    elif compiles == "model":
        inner.compile(backend="eager")
    wrap = shard if engine == "fsdp2" else lambda m: DistributedDataParallel(m, **(ddp or {}))
    optimizer = None if wrap_first or engine == "fsdp2" else optimizer_of(inner, dls)
    outer = wrap(inner)
    if hook == "stateful":
        outer.register_comm_hook({"mine": 1}, mean)
    elif hook:
        outer.register_comm_hook(None, mean_in_float32)
    optimizer = optimizer or optimizer_of(outer if give == "outer" else inner, dls)
    if resume:
        optimizer.load_state_dict(saved["state"])
    with outer.join() if join else nullcontext():
        traffic = train(outer, optimizer, steps, rank=rank, world=world, **training)
    return result(outer, optimizer, traffic)


def mean(state, bucket):
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def mean_in_float32(state, bucket):
    work = dist.all_reduce(bucket.buffer().float().div_(dist.get_world_size()), async_op=True)
    return work.get_future().then(lambda future: bucket.buffer().copy_(future.value()[0]))


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, options in json.loads((folder / "jobs.json").read_text()).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made = run(**options)
            except Exception as error:  # a job that is to fail fails on both ranks
                made = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
        made["warnings"] = [str(w.message) for w in caught]
        torch.save(made, folder / f"{name}-{dist.get_rank()}.pt")
        dist.barrier()
    leave_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
