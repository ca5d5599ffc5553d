"""Trains tiny models under DeepSpeed, one job after the other. Run by torchrun: `zero_worker.py FOLDER`, which holds
jobs.json; each rank leaves FOLDER/NAME-RANK.pt."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

import rosa
from rosa.training.processes import leave_process_groups
from tests.rosa.conftest import make_model, make_patched

ROWS = 4  # of the global batch
TRAINED = ("roae", "road", "layernorm", "lora")  # in the names of what may train
STEPS, INTERVAL = 14, 4
LEARNING = dict(lr=1e-2, weight_decay=0.1)


def build(lora=False, road=False, **changes):
    if road:
        return rosa.patch(make_model(**changes), rosa.RoadConfig()).train()
    if not lora:
        return make_patched(**changes).train()
    return get_peft_model(make_model(**changes), LoraConfig(r=2, target_modules="all-linear")).train()


def rows(step):
    return torch.randint(3, 96, (ROWS, 9), generator=torch.Generator().manual_seed(step))


def trained(model):
    return {n: p for n, p in model.named_parameters() if any(part in n for part in TRAINED)}


def values(model):
    """What every rank computes with, ZeRO-3's partitions gathered."""
    import deepspeed

    parameters = trained(model)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def initialize(stage, *, dls=None, model=None, labelled=True, clip=0.0, accumulate=1, bf16=False, **config):
    import deepspeed

    inner = build(**(model or {}))
    groups = rosa.layer_groups(inner) if labelled else rosa.trainable_parameters(inner)
    optimizer = torch.optim.AdamW(groups, **LEARNING)
    if dls is not None:
        optimizer = rosa.DynamicLayerSelection(optimizer, inner, **{"interval": INTERVAL} | dls)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size() // accumulate,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage} | config.pop("zero", {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which would replace the optimizer
        "bf16": {"enabled": bf16},
    } | config
    return deepspeed.initialize(model=inner, optimizer=optimizer, config=config)[0], optimizer


def train(engine, begin, steps, accumulate):
    """Returns the trained parameters' values after each step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    course = []
    for step in range(begin, steps):
        for part in rows(step)[rank::world].chunk(accumulate):
            engine.backward(engine(input_ids=part, labels=part).loss)
            engine.step()
        course.append(values(engine.module))
    return course


def run(stage, *, steps=STEPS, stop=None, folder=None, dls=None, accumulate=1, **options):
    engine, optimizer = initialize(stage, dls=dls, accumulate=accumulate, **options)
    course = [values(engine.module)]
    if stop:
        course += train(engine, 0, stop, accumulate)
        engine.save_checkpoint(folder / f"stage{stage}")
        engine, optimizer = initialize(stage, dls=dls, accumulate=accumulate, **options)
        engine.load_checkpoint(folder / f"stage{stage}")
    course += train(engine, stop or 0, steps, accumulate)
    history = [] if dls is None else [tuple(selection) for selection in optimizer.history]
    frozen = [name for name, p in trained(engine.module).items() if not p.requires_grad]
    return {"course": course, "history": history, "frozen": frozen}


def main(folder):
    import deepspeed

    deepspeed.init_distributed("gloo")
    for name, options in json.loads((folder / "jobs.json").read_text()).items():
        try:
            made = run(folder=folder, **options)
        except Exception as error:  # a job that is to fail fails on both ranks
            made = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        torch.save(made, folder / f"{name}-{dist.get_rank()}.pt")
        dist.barrier()
    leave_process_groups()


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(Path(sys.argv[1]))
