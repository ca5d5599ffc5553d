"""`rosa demo`: makes a base model, teaches it an unseen kind of problem with RoSA and with LoRA, and reports."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rosa.adapters.disk import load_adapter
from rosa.adapters.saving import save_adapter
from rosa.data.prompts import prompt
from rosa.demo.figure import draw_figure
from rosa.demo.methods import fine_tune_lora, fine_tune_rosa
from rosa.demo.report import (
    QUICK_NOTE,
    Accuracy,
    base_section,
    command_section,
    comparison_section,
    fine_tuning_section,
)
from rosa.evaluation.generation import answer
from rosa.miniature.base import BaseRecipe, base_model
from rosa.miniature.problems import SEEN, UNSEEN, exact_match, generate
from rosa.miniature.training import Schedule

MAX_NEW_TOKENS = 40  # the longest solution has about 30
BASES, ADAPTER, PICTURE = "base", "adapter", "demo.png"  # in the folder for the results


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults take a few minutes on two CPU cores."""

    base: BaseRecipe = field(default_factory=BaseRecipe)
    base_problems: int = 20_000
    problems: int = 2_000
    held_out: int = 200
    steps: int = 300
    batch_size: int = 16


# Shows in a fifth of the steps that everything runs. The base has learnt little by then, and neither method much.
QUICK = Sizes(
    BaseRecipe(schedule=Schedule(steps=160, batch_size=32, learning_rate=1.5e-3)),
    base_problems=5_000,
    problems=800,
    held_out=40,
    steps=60,
)


def run(output: Path, seed: int, sizes: Sizes | None = None) -> None:
    """Run the demo and print its report.

    Args:
        output (Path): folder for the base model, the adapter and the picture; made if need be. A base model that was
            made there with the same seed and sizes is used again.
        seed (int): of the problems, the first weights and the batches.
        sizes (Sizes, optional): for a smaller run.

    Raises:
        ValueError: in the folder there is something that no demo put there.
    """
    refuse_others_work(Path(output))
    with _quiet_libraries():
        _run(Path(output), seed, sizes or Sizes())


def _run(output: Path, seed: int, sizes: Sizes) -> None:
    start = time.perf_counter()
    print(
        f"RoSA demo on {torch.get_num_threads()} CPU threads, seed {seed}. All figures are measured in this run.",
        flush=True,
    )
    if sizes is QUICK:
        print(QUICK_NOTE, flush=True)

    seen = generate(SEEN, sizes.base_problems, sizes.held_out, seed)
    unseen = generate(UNSEEN, sizes.problems, sizes.held_out, seed)
    base, origin = _make_base(seen.train, sizes.base, seed, output / BASES)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    examine = partial(_examine, tokenizer=tokenizer, seen=seen.held_out, unseen=unseen.held_out)
    before, answers_before = examine(model)
    print(base_section(model, origin, before, sizes.held_out), flush=True)

    print(fine_tuning_section(unseen.train, sizes.steps, sizes.batch_size), flush=True)
    job = (base, tokenizer, unseen.train, sizes.steps, sizes.batch_size, seed)
    rosa = fine_tune_rosa(*job)
    lora = fine_tune_lora(*job, parameters=rosa.trainable)
    rosa_after, answers_after = examine(rosa.model)
    lora_after, _ = examine(lora.model)
    print(comparison_section(before, rosa, rosa_after, lora, lora_after), flush=True)

    adapter, picture = output / ADAPTER, output / PICTURE
    save_adapter(rosa.model, adapter)
    fresh = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    same = sum(map(operator.eq, _answers(fresh, tokenizer, unseen.held_out), answers_after))
    selection = rosa.trainer.layer_selection
    losses = {"RoSA": rosa.recorder.losses, "LoRA": lora.recorder.losses}
    draw_figure(losses, selection.history, selection.num_layers, picture)
    print(f"\nRoSA adapter: {adapter} (in a fresh model, {same} of {len(answers_after)} answers are the same)")
    print(f"Picture:      {picture}")

    problem = unseen.held_out[0]
    command = _command(base, adapter, problem["instruction"])
    print(command_section(command, _output_of(command), problem, answers_before[0]))
    print(f"\n{time.perf_counter() - start:.0f} s in all.")
    if sizes is QUICK:
        print(QUICK_NOTE)


def refuse_others_work(output: Path) -> None:
    """Raises ValueError where a folder holds what no demo has made. Its own is known by its bases, which come first."""
    bases = _names(output / BASES)
    own = {BASES, ADAPTER, PICTURE} if any(name.startswith("base-") for name in bases) else {BASES}
    others = [name for name in _names(output) if name not in own]
    others += [f"{BASES}/{name}" for name in bases if not name.startswith(("base-", "unfinished-"))]
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(f"{output} already holds {some}, which no demo has made: choose another folder (--output)")


def _names(folder: Path) -> list[str]:
    """What stands in a folder, if there is one; hidden files do not count."""
    found = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name for name in found if not name.startswith("."))


def _make_base(rows: Sequence[dict], recipe: BaseRecipe, seed: int, cache: Path) -> tuple[Path, str]:
    """The base's folder, and where it came from."""
    start, before = time.perf_counter(), set(cache.glob("base-*"))
    folder = base_model(rows, recipe, seed, cache)
    if folder in before:
        return folder, f"made by an earlier run, from {folder}"
    seconds = time.perf_counter() - start
    return folder, f"made in {seconds:.0f} s from {len(rows):,} problems, kept in {folder}"


def _examine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seen: Sequence[dict], unseen: Sequence[dict]
) -> tuple[Accuracy, list[str]]:
    """The model's accuracy on held-out problems, and its answers to those of the unseen kind."""
    answers = _answers(model, tokenizer, unseen)
    return Accuracy(exact_match(_answers(model, tokenizer, seen), seen), exact_match(answers, unseen)), answers


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]) -> list[str]:
    prompts = [prompt(row["instruction"]) for row in rows]
    return answer(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=100)


def _command(base: Path, adapter: Path, instruction: str) -> list[str]:
    options = {"--model": base, "--adapter": adapter, "--max-new-tokens": MAX_NEW_TOKENS, "--instruction": instruction}
    return [sys.executable, "-m", "rosa", "generate", *(str(part) for option in options.items() for part in option)]


def _output_of(command: list[str]) -> str:
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | quiet).stdout.strip()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without transformers' own messages and progress bars, which would drown the report."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
