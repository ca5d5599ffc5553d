"""Composition on a real model: capitals, worked word problems, and both, from one rotation of SmolLM2-135M-Instruct.

    python -m benchmarks.composition --model runs/smollm2    trains and tests what is not yet in benchmarks/results
    python -m benchmarks.composition                         writes docs/composition.md from what is kept there

A run that was stopped goes on where it was. How the model is got is said in docs/composition.md.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import rosa
from benchmarks.composition_data import FORM, SKILL, Row, Rows, make_rows
from rosa.adapters.composition import compose, composition_parameters, decompose, tasks_by_row, use_tasks
from rosa.evaluation.generation import answer
from rosa.evaluation.tasks.numbers import last_number
from rosa.storage.files import replace_files, replace_text

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "composition"
COLUMNS = {"neither": (), "form": (FORM,), "skill": (SKILL,), "both": (FORM, SKILL)}
BATCH = 8
SAVE_EVERY = 20
MAX_NEW_TOKENS = 96


class Setting(NamedTuple):
    """One way to compose and to train."""

    layers: tuple[int, ...]
    positions: int
    steps: int
    learning_rate: float

    @property
    def name(self) -> str:
        return (
            f"layers_{'_'.join(map(str, self.layers))}-last_{self.positions}-{self.steps}_steps-{self.learning_rate:g}"
        )


class Batch(NamedTuple):
    """Rows whose prompts, up to the tokens that are turned, have been through the model: nothing there ever changes."""

    cache: object
    inputs: dict[str, Tensor]  # of what is left of the prompts, and the answers
    tasks: list[str]


def batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], positions: int
) -> list[Batch]:
    """The training rows, half of each batch of either task."""
    return [_batch(model, tokenizer, rows[start : start + BATCH], positions) for start in range(0, len(rows), BATCH)]


@torch.no_grad()
def _batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], positions: int) -> Batch:
    prompts = [tokenizer(row.prompt)["input_ids"] for row in rows]
    answers = [[*tokenizer(row.answer)["input_ids"], tokenizer.eos_token_id] for row in rows]
    before = _padded([p[:-positions] for p in prompts], 0, left=True)
    known = _padded([[1] * (len(p) - positions) for p in prompts], 0, left=True)
    tail = _padded([p[-positions:] + a for p, a in zip(prompts, answers, strict=True)], 0)
    mask = torch.cat((known, _padded([[1] * (positions + len(a)) for a in answers], 0)), 1)
    labels = _padded([[-100] * positions + a for a in answers], -100)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    width = before.shape[1]
    cache = model.model(before, attention_mask=known, position_ids=at[:, :width], use_cache=True).past_key_values
    inputs = {"input_ids": tail, "attention_mask": mask, "position_ids": at[:, width:], "labels": labels}
    return Batch(cache, inputs, [row.task for row in rows])


def _padded(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    pads = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], setting: Setting) -> None:
    """Trains a composed model, both tasks together, each row under its own mask; goes on from a checkpoint."""
    torch.manual_seed(0)
    parameters = composition_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=setting.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / setting.steps)
    state = RUNS / setting.name / "state.pt"
    done, losses = 0, []
    if state.exists():
        kept = torch.load(state)
        done, losses = kept["done"], kept["losses"]
        for name, parameter in parameters.items():
            parameter.data.copy_(kept["parameters"][name])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
    if done == setting.steps:
        return
    made = batches(model, tokenizer, rows, setting.positions)
    started = time.perf_counter()
    for step in range(done, setting.steps):
        batch = made[_order(len(made), step)]
        with tasks_by_row(model, batch.tasks):
            loss = model(**batch.inputs, past_key_values=copy.deepcopy(batch.cache)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == setting.steps:
            recent = losses[-SAVE_EVERY:]
            seconds = (time.perf_counter() - started) / (step + 1 - done)
            print(
                f"{setting.name} step {step + 1} loss {sum(recent) / len(recent):.4f} {seconds:.1f} s/step", flush=True
            )
            content = {
                "done": step + 1,
                "losses": losses,
                "parameters": {name: p.detach() for name, p in parameters.items()},
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            buffer = io.BytesIO()
            torch.save(content, buffer)
            state.parent.mkdir(parents=True, exist_ok=True)
            replace_files({state: buffer.getvalue()})


def _order(batches: int, step: int) -> int:
    """The batch of a step: every epoch in an order of its own."""
    epoch, place = divmod(step, batches)
    return int(torch.randperm(batches, generator=torch.Generator().manual_seed(epoch))[place])


def test(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], tasks: Sequence[str]
) -> list[str]:
    """The answers of a composed model to the prompts of some rows."""
    with use_tasks(model, *tasks):
        return answer(model, tokenizer, [row.prompt for row in rows], max_new_tokens=MAX_NEW_TOKENS, batch_size=30)
