"""Runs a comparison: checks all of it, makes what is missing, chooses learning rates, trains and tests every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from rosa.adapters.pretrained import load_tokenizer
from rosa.comparison.cell import LOG_NAME, read_result, run_cell
from rosa.comparison.fit import check_fit, check_options
from rosa.comparison.inputs import Inputs, read_inputs
from rosa.comparison.overlap import told
from rosa.comparison.plan import Cell, Comparison
from rosa.comparison.workers import kill, submit, workers
from rosa.miniature.make import SEEN_TASK, make
from rosa.storage.locking import alone_in


def run(comparison: Comparison, jobs: int = 1) -> tuple[Comparison, list[dict[str, Any]]]:
    """Run what a comparison lacks.

    Everything is checked before the first step of training. Each cell's outcome is on disk as soon as it is there, and
    is not repeated: the same call after a death goes on. Its tests are, where there are more of them now or their
    truths have changed.

    Args:
        comparison (Comparison): what to run.
        jobs (int): cells at a time, each in a process of its own; with several GPUs, each on the next of them.

    Returns:
        tuple: the comparison with what its miniature made filled in, and the outcomes of all cells, those that tried
            learning rates first.

    Raises:
        ValueError, OSError: the settings, the data, a model or a cell is at fault, a finished cell was made with
            others, or another comparison runs in the folder. Finished cells stay.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    _check_options(comparison)  # before a miniature is made, which takes its time
    with alone_in(comparison.output):
        return _run(_with_miniature(comparison), jobs)


def _run(comparison: Comparison, jobs: int) -> tuple[Comparison, list[dict[str, Any]]]:
    tuning = [
        comparison.tuning_cell(model, method, rate)
        for model in comparison.models
        for method in comparison.methods
        for rate in comparison.rates(method)
    ]
    first = tuning or _cells(comparison, {})
    inputs = _check(comparison, first)
    for name, shares in inputs.seen.items():
        if text := told(shares):
            print(f"{name}: {text} Right answers to them may be recalled.")
    with workers(jobs) as pool:
        tuned = _finish(tuning, inputs, pool, "learning rates")
        return comparison, tuned + _finish(_cells(comparison, best_rates(tuned)), inputs, pool, "cells")


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


def _check_options(comparison: Comparison) -> None:
    to_come = {"data": "the miniature's"} if comparison.miniature is not None else {}
    for method in comparison.methods:
        check_options(replace(comparison, train={**to_come, **comparison.train}).cell("any model", method, 0))


def _check(comparison: Comparison, cells: Sequence[Cell]) -> Inputs:
    """Finds what is wrong before any training; returns what the cells are made with."""
    for model in comparison.models:
        load_tokenizer(model)
    inputs = read_inputs(comparison, cells)
    for cell in {(cell.model, cell.method): cell for cell in cells if cell.trains}.values():
        check_fit(cell)
    for cell in cells:
        read_result(cell, inputs)
    return inputs


def _finish(cells: Sequence[Cell], inputs: Inputs, pool: ProcessPoolExecutor, what: str) -> list[dict[str, Any]]:
    """The outcomes of these cells, after running those that have none."""
    left = [cell for cell in cells if read_result(cell, inputs) is None]
    with tqdm(total=len(cells), initial=len(cells) - len(left), desc=what) as bar:
        futures = dict(zip(submit(pool, run_cell, [(cell, inputs) for cell in left]), left, strict=True))
        for future in futures:
            future.add_done_callback(lambda done: done.cancelled() or bar.update())
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            kill(pool)
            raise KeyboardInterrupt("finished cells stay; the same command goes on from them") from None
        if any(future.exception() for future in done):
            pool.shutdown(cancel_futures=True)  # the cells that run now finish first, and stay
            _raise_first(done, futures)
    return [read_result(cell, inputs) for cell in cells]


def _raise_first(done: set[Future], cells: dict[Future, Cell]) -> None:
    future = next(future for future in cells if future in done and future.exception())
    cell, error = cells[future], future.exception()
    raise ValueError(
        f"{cell.method}, {cell.folder.name}: {type(error).__name__}: {error} (log: {cell.folder / LOG_NAME}). Finished "
        "cells are kept; the same command goes on from them"
    ) from error
