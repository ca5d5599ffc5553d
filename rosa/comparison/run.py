"""Runs a comparison: checks all of it, makes what is missing, chooses learning rates, trains and tests every cell."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from rosa.comparison.cell import LOG_NAME, read_result, run_cell
from rosa.comparison.fit import check_fit, check_options
from rosa.comparison.plan import Cell, Comparison
from rosa.data import load_rows
from rosa.miniature.make import SEEN_TASK, make
from rosa.tasks import find_tasks, load_test_rows


def run(comparison: Comparison, jobs: int = 1) -> tuple[Comparison, list[dict[str, Any]]]:
    """Run what a comparison lacks.

    Everything is checked before the first step of training. Each cell's outcome is on disk as soon as it is there, and
    is not repeated: the same call after a death goes on.

    Args:
        comparison (Comparison): what to run.
        jobs (int): cells at a time, each in a process of its own; with several GPUs, each on the next of them.

    Returns:
        tuple: the comparison with what its miniature made filled in, and the outcomes of all cells, those that tried
            learning rates first.

    Raises:
        ValueError, OSError: the settings, the data, a model or a cell is at fault. Finished cells stay.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    _check_options(comparison)  # before a miniature is made, which takes its time
    comparison = _with_miniature(comparison)
    tuning = [
        comparison.tuning_cell(model, method, rate)
        for rate in comparison.learning_rates
        for model in comparison.models
        for method in comparison.methods
    ]
    _check(comparison, tuning or _cells(comparison, {}))
    with _pool(jobs) as pool:
        tuned = _finish(tuning, comparison, pool, "learning rates")
        return comparison, tuned + _finish(_cells(comparison, best_rates(tuned)), comparison, pool, "cells")


def best_rates(outcomes: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Of each model and method, the learning rate with the lowest validation loss."""
    losses: dict[tuple[str, str], dict[float, float]] = {}
    for outcome in outcomes:
        by_rate = losses.setdefault((outcome["model"], outcome["method"]), {})
        loss = outcome.get("validation_loss", math.inf)
        by_rate[outcome["settings"]["learning_rate"]] = math.inf if math.isnan(loss) else loss
    return {key: min(by_rate, key=by_rate.get) for key, by_rate in losses.items()}


def _cells(comparison: Comparison, rates: dict[tuple[str, str], float]) -> list[Cell]:
    """All that are to be tested, with the learning rates that were chosen; seed after seed, so that a comparison that
    was cut short has something of every method."""
    return [comparison.base_cell(model) for model in comparison.models] + [
        comparison.cell(model, method, seed, rates.get((model, method)))
        for seed in comparison.seeds
        for model in comparison.models
        for method in comparison.methods
    ]


def _with_miniature(comparison: Comparison) -> Comparison:
    if comparison.miniature is None:
        return comparison
    made = make(comparison.output / "miniature", comparison.miniature)
    return replace(
        comparison,
        miniature=None,
        models=(str(made.model),),
        train={**comparison.train, "data": str(made.data)},
        tasks=",".join(name for name in made.tasks if name != SEEN_TASK),
        side_tasks=SEEN_TASK,
        data_dir=made.data_dir,
    )


def _all_tasks(comparison: Comparison) -> str:
    return ",".join(filter(None, (comparison.tasks, comparison.side_tasks)))


def _check_options(comparison: Comparison) -> None:
    to_come = {"data": "the miniature's"} if comparison.miniature is not None else {}
    for method in comparison.methods:
        check_options(replace(comparison, train={**to_come, **comparison.train}).cell("any model", method, 0))


def _check(comparison: Comparison, cells: Sequence[Cell]) -> None:
    for task in find_tasks(_all_tasks(comparison), comparison.data_dir):
        load_test_rows(task, comparison.data_dir)
    for data in {cell.settings["data"] for cell in cells if cell.trains}:
        load_rows(data)
    for model in comparison.models:
        try:
            AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {model}: {error}") from error
    for cell in {(cell.model, cell.method): cell for cell in cells if cell.trains}.values():
        check_fit(cell)
    for cell in cells:
        read_result(cell)


def _finish(
    cells: Sequence[Cell], comparison: Comparison, pool: ProcessPoolExecutor, what: str
) -> list[dict[str, Any]]:
    """The outcomes of these cells, after running those that have none."""
    left = [cell for cell in cells if read_result(cell) is None]
    job = (_all_tasks(comparison), comparison.data_dir, comparison.decoding)
    with tqdm(total=len(cells), initial=len(cells) - len(left), desc=what) as bar:
        futures = {pool.submit(run_cell, cell, *job): cell for cell in left}
        for future in futures:
            future.add_done_callback(lambda done: done.cancelled() or bar.update())
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            for process in pool._processes.values():
                process.kill()
            raise
        if any(future.exception() for future in done):
            pool.shutdown(cancel_futures=True)  # the cells that run now finish first, and stay
            _raise_first(done, futures)
    return [read_result(cell) for cell in cells]


def _pool(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_settle, initargs=(numbers, jobs))


def _raise_first(done: set[Future], cells: dict[Future, Cell]) -> None:
    future = next(future for future in cells if future in done and future.exception())
    cell, error = cells[future], future.exception()
    raise ValueError(
        f"{cell.method}, {cell.folder.name}: {type(error).__name__}: {error} (log: {cell.folder / LOG_NAME}). Finished "
        "cells are kept; the same command goes on from them"
    ) from error


def _settle(numbers: SimpleQueue, jobs: int) -> None:
    """Gives a process its GPU, or its share of the processor's threads."""
    number = numbers.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))
    sys.stdin.close()
