"""A cell of each of the paper's tables, run with a small model: the commands of docs/paper.md from beginning to end.

    make base && python -m benchmarks.paper_trial LLM-Adapters/dataset    runs what is not finished
    python -m benchmarks.paper                                            writes what came out into docs/paper.md

Twenty steps and ten rows of each benchmark show that a file of configs/paper runs, and nothing about its methods.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator, Mapping

from benchmarks.paper_counts import CONFIGS
from benchmarks.paper_printed import table
from benchmarks.results import RESULTS
from benchmarks.smollm2.base import FOLDER, MODEL

KEPT = RESULTS / "paper_trial"
CELLS = {  # the file, and the one of its methods that is run
    "table1_commonsense": "RoSA",
    "table2_model_sizes": "RoSA",
    "table3_arithmetic": "RoSA",
    "table4_ablations": "RoSA, k_ratio 0.25",
    "dypam_arithmetic": "RoSA",
    "dypam_commonsense": "RoSA",
}


def command(name: str, data_dir: str) -> list[str]:
    """The arguments of `rosa` that run a cell.

    Args:
        name (str): one of CELLS.
        data_dir (str): the benchmarks' folders, as in `rosa compare`.
    """
    arithmetic = name.endswith("arithmetic")
    changes = {
        "models": f"[{MODEL}]",
        "seeds": "[2333]",
        "data_dir": data_dir,
        "train.data": FOLDER / f"{'arithmetic' if arithmetic else 'commonsense'}.json",
        "train.max_steps": 20,
        "train.val_size": 16,
        "train.use_cpu": "true",
        "decoding.limit": 10,
        "decoding.max_new_tokens": 128 if arithmetic else 32,
        "output": KEPT / name,
    }
    config = str(CONFIGS / f"{name}.yaml")
    return ["compare", "--config", config, "--only", CELLS[name], "--set", *(f"{k}={v}" for k, v in changes.items())]


def rows(name: str) -> list[Mapping[str, str]]:
    """The rows of the comparison's table, the base's and the method's; none where it has not been run."""
    files = KEPT.glob(f"{name}/table-*.csv")
    return [row for file in files for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())]


def trial_table() -> str:
    """What came out: of a few steps and rows."""
    head = ["configs/paper", "method", "trained, in %", "held-out loss", "right answers, in %", "the base's"]
    return table(head, [[f"`{name}.yaml`", *_cells(*rows(name))] for name in CELLS if rows(name)])


def _cells(base: Mapping[str, str], row: Mapping[str, str]) -> Iterator[str]:
    yield row["method"]
    yield f"{float(row['trainable']):.3f}"
    yield f"{float(row['validation_loss']):.3f}"
    for each in (row, base):
        yield f"{float(each['micro_average']):.1f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_trial",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_dir", help="the benchmarks' folders, as in `rosa compare`")
    data_dir = parser.parse_args().data_dir
    for name in CELLS:
        subprocess.run([sys.executable, "-m", "rosa", *command(name, data_dir)], check=True)


if __name__ == "__main__":
    main()
