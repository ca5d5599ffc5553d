"""Layers that pay: what saving there is in training some layers only, in operations to a given held-out loss.

    make base
    python -m benchmarks.smollm2.layer_choice            runs what is not finished, writes docs/layers.md and picture
    python -m benchmarks.smollm2.layer_choice --report   writes it from what is kept
    ... --tasks arithmetic --seeds 1 --rules all upper

SmolLM2-135M-Instruct learns by RoSA as in configs/smollm2, with the settings below in place of those there. A run that
was cut short goes on from its last checkpoint (runs/layer_choice). Results are kept in benchmarks/results/layer_choice:
of every run the held-out losses, the operations until then, and what was selected.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, TrainerCallback, set_seed

import rosa
from benchmarks.smollm2 import layer_report
from benchmarks.smollm2.base import MODEL
from benchmarks.smollm2.layer_rules import RULES, Rule
from benchmarks.smollm2.step_flops import TYPICAL, Batch, StepFlops, layers_that_train, step_flops
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.data.rows import load_rows
from rosa.data.tokens import IGNORED_LABEL, tokenize
from rosa.selection.log import read_entry
from rosa.storage.files import replace_text
from rosa.training.parsing import parse
from rosa.training.resuming import changes, last_checkpoint, made_with
from rosa.training.trainer import RosaTrainer

CONFIGS = Path(__file__).parents[2] / "configs" / "smollm2"
CHECKPOINTS = Path("runs/layer_choice")
TASKS, SEEDS = ("arithmetic", "commonsense"), (1, 2)
DECAY, HELD_OUT = 25, 64
INTERVAL, K_RATIO = 10, 0.5  # the paper's 40 would select twice in 100 steps
SPLIT = 2333  # the seed that draws the rows held out, the same ones in all runs
# Before its decay a run is the same however long it is to be, which under a cosine it is not.
SETTINGS = {
    "alpha": 1.0, "learning_rate": 3e-3, "norm_learning_rate": 1e-3, "lr_scheduler_type": "warmup_stable_decay",
    "warmup_steps": 5, "per_device_eval_batch_size": 8, "eval_steps": 25, "save_steps": 25, "logging_steps": 25,
}  # fmt: skip


class CountingTrainer(RosaTrainer):
    """A RosaTrainer whose `total_flos` are the operations of the steps as they were made, and are in its log."""

    def __init__(self, model, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.products: StepFlops = step_flops(model)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        labels = inputs["labels"]
        batch = Batch(*labels.shape, int((labels[:, 1:] != IGNORED_LABEL).sum()))
        return self.products.forward(batch) + self.products.backward(batch, layers_that_train(self.model))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.store_flos()
        super().log({**logs, "flops": self.state.total_flos}, *args, **kwargs)


class Keep(TrainerCallback):
    """Keeps a run's course in a file after every evaluation."""

    def __init__(self, file: Path):
        self.file = file

    def on_evaluate(self, args, state, control, **kwargs):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.file, "".join(json.dumps(line) + "\n" for line in course(state.log_history)))


def course(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept of a Trainer's log: evaluations (step, flops, loss) and selections (step, layers, exploited,
    scores)."""
    kept = []
    for entry in log_history:
        selection = read_entry(entry)
        if selection is not None:
            made = selection[0]
            kept.append(made._asdict() | {"scores": [float(f"{score:.4g}") for score in made.scores]})
        elif "eval_loss" in entry:
            kept.append({"step": entry["step"], "flops": entry["flops"], "loss": entry["eval_loss"]})
    return kept


def chosen(rule: Rule, products: StepFlops, seed: int) -> dict[str, Any] | None:
    """The arguments of layer selection under a rule; None where it selects none."""
    if not rule.selects:
        return None
    k = int(K_RATIO * len(products.linears))
    priorities = rule.priorities and rule.priorities(products.costs(TYPICAL), k)
    return {"k_ratio": K_RATIO, "interval": INTERVAL, "seed": seed, "priorities": priorities}


def adapted(rule: Rule, layers: int) -> list[int]:
    """The layers that have an adapter under a rule."""
    begin, end = (round(share * layers) for share in rule.adapted)
    return list(range(begin, end))


def run(task: str, name: str, seed: int, model: Path = MODEL, **settings: Any) -> Path:
    """Trains by one rule, from the last checkpoint on if there is one; returns the file with its course.

    Args:
        task (str): one of TASKS.
        name (str): one of RULES.
        seed (int): of the adapter, the order of the rows and the selections.
        model (path): the base's folder.
        **settings: options of `rosa train` in place of SETTINGS and of the task's configuration.

    Raises:
        ValueError: its checkpoint was made with other settings.
    """
    rule, output = RULES[name], CHECKPOINTS / task / f"{name}-{seed}"
    file = layer_report.course_file(task, name, seed)
    options = {
        "model": model,
        "output": output,
        "seed": seed,
        "max_steps": layer_report.steps_of(name),
        "val_size": HELD_OUT,
    }
    options |= {"lr_scheduler_kwargs": json.dumps({"num_decay_steps": DECAY})} | SETTINGS | settings
    words = [f"--{key}={value}" for key, value in options.items()]
    job, args = parse(["--config", str(CONFIGS / f"train_{task}.yaml"), *words])

    rows = load_rows(job.data)
    random.Random(SPLIT).shuffle(rows)
    tokenizer = load_tokenizer(job.model)
    held_out, train = (
        tokenize(part, tokenizer, max_length=job.max_length) for part in (rows[: job.val_size], rows[job.val_size :])
    )
    made = made_with(job, args, rows) | {"rule": name, "interval": INTERVAL, "k_ratio": K_RATIO, "split": SPLIT}
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        changes(checkpoint, made)
    set_seed(seed)
    base = load_model(job.model, attn_implementation=job.attn_implementation)
    layers = adapted(rule, base.config.num_hidden_layers)
    patched = rosa.patch(base, rosa.RosaConfig(alpha=job.alpha, rank=job.rank, layers=layers))
    set_seed(seed)
    trainer = CountingTrainer(
        patched,
        args,
        dls=chosen(rule, step_flops(patched), seed),
        norm_learning_rate=job.norm_learning_rate,
        made_with=made,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Keep(file)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2.layer_choice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=tuple(RULES))
    given = parser.parse_args()
    for task, seed, name in ((t, s, r) for t in given.tasks for s in given.seeds for r in given.rules):
        if not given.report and layer_report.steps_made(task, name, seed) < layer_report.steps_of(name):
            run(task, name, seed)
    layer_report.write()


if __name__ == "__main__":
    main()
