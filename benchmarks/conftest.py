"""The benchmarks' options and fixtures: `measure` times and records a function, `record` keeps a row of its own."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # models and inputs are made here

import pytest
import torch

from benchmarks.presets import PRESETS
from benchmarks.providers import unavailable
from benchmarks.results import Recorder

RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser):
    group = parser.getgroup("RoSA benchmarks")
    group.addoption("--preset", choices=PRESETS, help="model of the training step (default: the largest that fits)")
    group.addoption("--results", type=Path, help="file for the rows (default: benchmarks/results/<device>/<date>.json)")


def pytest_configure(config):
    config.stash[RECORDER] = Recorder(config.getoption("--results"))


@pytest.fixture(autouse=True)
def _skip_unavailable(request):
    """Skips, with the reason, a provider that cannot run here."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "case" in parameters and (reason := unavailable(parameters["provider"], parameters["case"])):
        pytest.skip(reason)


@pytest.fixture
def record(request):
    """`record(**row)` keeps a row of data."""
    return lambda **row: request.config.stash[RECORDER].add(row)


@pytest.fixture
def measure(benchmark, record):
    """`measure(function, **row)` times a function and keeps the row with its time.

    The time is the median: on a GPU of device events, after warm-up, with the L2 cache flushed before every repetition.
    """

    def measured(function, **row):
        benchmark.group = " ".join(str(row[label]) for label in ("group", "mode", "shape", "batch", "seq"))
        if benchmark.disabled:  # --benchmark-disable: run once, time nothing
            function()
            return
        if torch.cuda.is_available():
            from triton.testing import do_bench

            milliseconds = do_bench(function, return_mode="median")
            benchmark.extra_info["device_ms"] = milliseconds
            benchmark.pedantic(lambda: (function(), torch.cuda.synchronize()), rounds=3)
        else:
            benchmark(function)
            milliseconds = benchmark.stats.stats.median * 1e3
        record(**row, milliseconds=milliseconds)

    return measured


def pytest_terminal_summary(terminalreporter, config):
    recorder = config.stash[RECORDER]
    if not recorder.rows:
        return
    terminalreporter.write_line(f"{len(recorder.rows)} rows in {recorder.path}")
    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "These are CPU times at small sizes, on the reference backend. They say nothing about a GPU."
        )
