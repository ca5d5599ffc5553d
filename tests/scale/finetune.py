"""Trains with RosaTrainer under the engine that launched it: `finetune.py FOLDER OPTIONS`, the options in JSON; with
`methods`, one after the other in folders of their names."""

import json
import os
import signal
import sys

import torch
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback, TrainingArguments

import rosa
from rosa.adapters.parameters import adapter_parameters
from rosa.models.sharding import whole
from rosa.training.processes import leave_process_groups
from tests.rosa.conftest import make_model, make_patched

STEPS, GLOBAL_BATCH = 12, 4


class At(TrainerCallback):
    """Calls `act` with the trainer's control at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


def make(method="rosa"):
    if method == "road":
        return rosa.patch(make_model(dtype=torch.float64), rosa.RoadConfig(adapter_dtype="float64"))
    return make_patched(config=rosa.RosaConfig(rank=4, adapter_dtype="float64"), dtype=torch.float64)


def responses(rows):
    """Labels of the last one to seven tokens of nine, so that ranks have different numbers of them."""
    lengths = 1 + torch.arange(len(rows)) * 5 % 7
    return torch.where(torch.arange(9) < 9 - lengths[:, None], -100, rows)


class CountLogits:
    """The number of rows that a model's output layer is given, batch by batch, in training."""

    def __init__(self, model):
        self.rows = []
        model.lm_head.register_forward_pre_hook(self.count)

    def count(self, head, args):
        if torch.is_grad_enabled():
            self.rows.append(args[0].shape[:-1].numel())


def make_trainer(folder, *, method="rosa", world=1, dls=None, response_logits=True, **arguments):
    rows = torch.randint(3, 96, (64, 9), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, responses(rows), strict=True)]
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world, save_steps=3,
        logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True, seed=11,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    arguments = TrainingArguments(**settings | arguments)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate turns FSDP on for accelerators only, and runs DDP on a CPU without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    dls = "auto" if method == "road" else {"interval": 5} | (dls or {})
    options = dict(dls=dls, response_logits=response_logits)
    return rosa.RosaTrainer(make(method), arguments, train_dataset=data, **options)


def values(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: whole(p.detach()).clone() for name, p in adapter_parameters(model).items()}


def stop(control):
    control.should_training_stop = True


def die(control):
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder, *, stop_at=None, resume=False, die_at=None, poison_at=None, **options):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(folder, world=world, **options)
    logits = CountLogits(trainer.model)
    if stop_at:
        trainer.add_callback(At(stop_at, stop))
    if die_at and rank == 1:
        trainer.add_callback(At(die_at, die))
    if poison_at and rank == 1:
        head = trainer.model.lm_head.weight
        trainer.add_callback(At(poison_at, lambda _: torch.nn.init.constant_(head, float("nan"))))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FloatingPointError as error:
        sys.exit(f"rank {rank}: FloatingPointError: {error}")
    made = {
        "values": values(trainer),
        "history": trainer.layer_selection.history if trainer.layer_selection else [],
        "logits": logits.rows,
        "engine": str(trainer.accelerator.distributed_type),
    }
    torch.save(made, f"{folder}/rank{rank}.pt")


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    methods = options.pop("methods", None)
    for name in methods or ["rosa"]:
        main(f"{sys.argv[1]}/{name}" if methods else sys.argv[1], method=name, **options)
    leave_process_groups()
