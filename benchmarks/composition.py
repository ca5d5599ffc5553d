"""Composition on a real model: capitals, worked word problems, and both, from rotations in SmolLM2-135M-Instruct.

    python -m benchmarks.composition --model FOLDER    trains and tests what benchmarks/results does not hold yet
    python -m benchmarks.composition                   writes docs/composition.md from what is kept there

Stopped and started again it goes on where it was. docs/composition.md says how the model is got.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

import rosa
from benchmarks import composition_report as report
from benchmarks.composition_data import FORM, SKILL, Row, Rows, make_rows, write_form
from rosa.evaluation.generation import answer
from rosa.storage.files import replace_files

RUNS = Path(__file__).parent.parent / "runs" / "composition"
FORM_ROWS = report.KEPT / "form.jsonl"
COLUMNS = {"form": (FORM,), "skill": (SKILL,), "both": (FORM, SKILL)}
BATCH, SAVE_EVERY = 8, 20
MAX_NEW_TOKENS = 64


class Setting(NamedTuple):
    """One way to compose and to train."""

    layers: tuple[int, ...]  # from 0
    positions: int
    steps: int = 100
    learning_rate: float = 0.05

    @property
    def name(self) -> str:
        return f"layers_{'_'.join(map(str, self.layers))}-last_{self.positions}"


# The paper's, the middle layer at the last token of the prompt; and one and four layers at all four tokens that stand
# between the question and the answer.
SETTINGS = (Setting((15,), 1), Setting((15,), 4, learning_rate=0.03), Setting((4, 10, 16, 22), 4))


class Batch(NamedTuple):
    """Rows whose prompts, up to the tokens that are turned, have been through the model: nothing changes there."""

    cache: Cache
    inputs: dict[str, Tensor]  # what is left of the prompts, and the answers
    tasks: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.composition",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="FOLDER", help="train and test this model first, as far as it is to be done")
    folder = parser.parse_args().model
    if folder is not None:
        run(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    report.write()


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Sequence[Setting] = SETTINGS) -> None:
    """Trains and tests all settings, and keeps the answers."""
    torch.set_num_threads(1)
    if not FORM_ROWS.exists():
        write_form(model, tokenizer, FORM_ROWS)
    rows = make_rows(FORM_ROWS)
    for setting in settings:
        rosa.compose(model, (FORM, SKILL), setting.layers, setting.positions)
        train(model, tokenizer, rows.train, setting)
        test(model, tokenizer, rows, {"setting": setting.name, **setting._asdict()}, COLUMNS)
        test(model, tokenizer, rows, {"setting": "base"}, {"neither": ()})
        # The base writes at length, and may come to its answer later.
        alone = rows._replace(questions=[])
        test(model, tokenizer, alone, {"setting": "base"}, {report.AT_LENGTH: ()}, report.LENGTH)
        rosa.decompose(model)


def test(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    labels: dict,
    columns: dict[str, tuple[str, ...]],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> None:
    """Keeps a composed model's answers to the held-out rows, with every column's tasks, that are not kept yet."""
    for column, tasks in columns.items():
        if report.find(labels["setting"], column) is not None:
            continue
        with rosa.use_tasks(model, *tasks):
            problems, questions = (
                answer(model, tokenizer, [row.prompt for row in part], max_new_tokens=max_new_tokens, batch_size=60)
                for part in (rows.problems, rows.questions)
            )
        numbers = [row.number for row in rows.problems]
        report.keep({**labels, "column": column, "numbers": numbers, "problems": problems, "questions": questions})


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], setting: Setting) -> None:
    """Trains a composed model, both tasks together, each row under its own mask; goes on from a checkpoint."""
    parameters = rosa.composition_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=setting.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / setting.steps)
    checkpoint = RUNS / setting.name / "state.pt"
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint)
        losses = state["losses"]
        model.load_state_dict(state["parameters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    if len(losses) == setting.steps:
        return
    batches = [_batch(model, tokenizer, part, setting.positions) for part in _parts(rows)]
    started, first = time.perf_counter(), len(losses)
    while len(losses) < setting.steps:
        batch = batches[_number(len(batches), len(losses))]
        with rosa.tasks_by_row(model, batch.tasks):
            loss = model(**batch.inputs, past_key_values=copy.deepcopy(batch.cache)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % SAVE_EVERY == 0 or len(losses) == setting.steps:
            recent = losses[-SAVE_EVERY:]
            seconds = (time.perf_counter() - started) / (len(losses) - first)
            mean = sum(recent) / len(recent)
            print(f"{setting.name}: step {len(losses)}, loss {mean:.3f}, {seconds:.1f} s a step", flush=True)
            state = {
                "losses": losses,
                "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            content = io.BytesIO()
            torch.save(state, content)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            replace_files({checkpoint: content.getvalue()})
    rosa.save_composition(model, checkpoint.parent)


def _parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _number(batches: int, step: int) -> int:
    """The batch of a step: every epoch in an order of its own."""
    epoch, place = divmod(step, batches)
    return int(torch.randperm(batches, generator=torch.Generator().manual_seed(epoch))[place])


@torch.no_grad()
def _batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], positions: int) -> Batch:
    prompts = [tokenizer(row.prompt)["input_ids"] for row in rows]
    answers = [[*tokenizer(row.answer)["input_ids"], tokenizer.eos_token_id] for row in rows]
    before = _padded([prompt[:-positions] for prompt in prompts], 0, left=True)
    known = _padded([[1] * (len(prompt) - positions) for prompt in prompts], 0, left=True)
    mask = torch.cat((known, _padded([[1] * (positions + len(text)) for text in answers], 0)), 1)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    start = before.shape[1]
    cache = model.model(before, attention_mask=known, position_ids=at[:, :start], use_cache=True).past_key_values
    inputs = {
        "input_ids": _padded([p[-positions:] + text for p, text in zip(prompts, answers, strict=True)], 0),
        "labels": _padded([[-100] * positions + text for text in answers], -100),
        "attention_mask": mask,
        "position_ids": at[:, start:],
    }
    return Batch(cache, inputs, [row.task for row in rows])


def _padded(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    pads = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])


if __name__ == "__main__":
    main()
