"""Measures, and keeps what was measured as rows of data in `benchmarks/results/<device>/<date>.json`."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[list]()


def device_name() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
    return name.replace(" ", "_").lower()


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def measure(benchmark, request):
    """`measure(function, **labels)` times the function and keeps the labels and the median time as a row."""

    def measured(function, **labels):
        benchmark.group = " ".join(str(labels[name]) for name in ("op", "mode", "shape", "batch", "seq"))
        if torch.cuda.is_available():
            from triton.testing import do_bench

            # Device events, warm-up, and a flush of the L2 cache before every repetition.
            milliseconds = do_bench(function, warmup=50, rep=200, return_mode="median")
            benchmark.extra_info["device_ms"] = milliseconds
            benchmark.pedantic(lambda: (function(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)
        else:
            benchmark(function)
            milliseconds = benchmark.stats.stats.median * 1e3
        request.config.stash[ROWS].append({**labels, "milliseconds": milliseconds})

    return measured


def pytest_sessionfinish(session):
    rows = session.config.stash[ROWS]
    if not rows:
        return
    folder = RESULTS / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}.json"
    path.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")
    print(f"\nresults in {path}")
    if not torch.cuda.is_available():
        print("These are CPU times at small sizes, on the reference backend. They say nothing about a GPU.")


def environment() -> dict[str, str | None]:
    """Versions, driver and commit, for the record."""
    import transformers
    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
