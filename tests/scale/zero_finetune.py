"""Trains with RosaTrainer under DeepSpeed, stops and resumes: `zero_finetune.py FOLDER STAGE`, FOLDER with a base. RoSA
first, then RoAd, which selects no layers."""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, set_seed

import rosa
from rosa.training.processes import leave_process_groups
from tests.scale.finetune import CountLogits, responses

STEPS, STOP, GLOBAL_BATCH = 12, 6, 4


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


METHODS = {"rosa": (rosa.RosaConfig(rank=4), {"interval": 4}), "road": (rosa.RoadConfig(), "auto")}


def make_trainer(folder, output, *, method="rosa", world=1, deepspeed=None, stop=STEPS, response_logits=True):
    arguments = TrainingArguments(
        output_dir=f"{folder}/{output}", max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world,
        save_steps=STOP, logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True, seed=11,
        lr_scheduler_type="cosine", max_grad_norm=0.05, deepspeed=deepspeed,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")  # which ZeRO-3 partitions as it comes
    set_seed(0)
    adapter, dls = METHODS[method]
    rosa.patch(model, adapter)
    rows = torch.randint(3, 96, (64, 9), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, responses(rows), strict=True)]
    options = dict(dls=dls, response_logits=response_logits)
    return rosa.RosaTrainer(model, arguments, train_dataset=data, callbacks=[StopAt(stop)], **options)


def config(stage):
    return {
        # Without a threshold ZeRO-3 would leave parameters as small as these whole on every rank.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }


def main(folder, stage):
    for method in METHODS:
        output = f"{method}-zero{stage}"
        zero = dict(method=method, world=int(os.environ["WORLD_SIZE"]), deepspeed=config(stage))
        make_trainer(folder, output, stop=STOP, **zero).train()
        resumed = make_trainer(folder, output, **zero)
        logits = CountLogits(resumed.model)
        resumed.train(resume_from_checkpoint=True)
        resumed.save_model()
        selection = resumed.layer_selection
        made = {
            "history": [] if selection is None else [tuple(selection) for selection in selection.history],
            "logits": logits.rows,
        }
        try:
            rosa.load_adapter(resumed.model, f"{folder}/{output}/checkpoint-{STOP}")
        except ValueError as error:
            made["error"] = str(error)
        torch.save(made, f"{folder}/{output}/rank{dist.get_rank()}.pt")
        dist.barrier()
    leave_process_groups()


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(sys.argv[1], int(sys.argv[2]))
