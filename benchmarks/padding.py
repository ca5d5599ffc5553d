"""How much of the papers' training is padding: the table of docs/paper.md, counted from lengths that are kept.

    python -m benchmarks.padding --save TOKENIZER DATA    keeps the lengths of the data's rows in benchmarks/results
    python -m benchmarks.padding                          writes the table from what is kept

TOKENIZER is a folder with a tokenizer, DATA one with the files that `FILES` names. A length is what `rosa train` makes
of a row: prompt, response and end.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import BatchSampler, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.document import update
from benchmarks.tables import markdown
from rosa.adapters.pretrained import load_tokenizer
from rosa.data.rows import load_rows
from rosa.data.tokens import tokenize
from rosa.storage.settings import load_settings
from rosa.training.padding import padding_share

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "paper.md"
KEPT = ROOT / "benchmarks" / "results" / "padding" / "lengths.csv"
COMMONSENSE, MATH = "four sets of Commonsense15K", "math_data"
FILES = {
    COMMONSENSE: [f"benchmarks/{name}/train.json" for name in ("boolq", "ARC-Challenge", "ARC-Easy", "openbookqa")],
    MATH: ["training/math_data.json"],
}
ORDERS = 3  # epochs of the papers' runs, each in another order


class Regime(NamedTuple):
    """How a configuration of ours makes batches of data."""

    data: str
    config: str
    rows: int  # of a micro-batch
    accumulation: int


def regimes() -> list[Regime]:
    """Those of both papers, by their configurations."""
    found = []
    for data, config in (
        (COMMONSENSE, "paper/commonsense15k.yaml"), (MATH, "paper/math10k.yaml"), (MATH, "road.yaml"),
    ):  # fmt: skip
        settings = load_settings(ROOT / "configs" / config)
        settings = settings.get("train", settings)
        batch = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
        found.append(Regime(data, config, *batch))
    return found


def at_random(lengths: Sequence[int], regime: Regime) -> float:
    """The share of tokens that is padding, with the rows in random order."""
    return _share(lengths, regime, lambda generator: RandomSampler(lengths, generator=generator))


def grouped(lengths: Sequence[int], regime: Regime) -> float:
    """The same with the rows grouped by length, as Trainer does it."""
    step = regime.rows * regime.accumulation
    return _share(lengths, regime, lambda generator: LengthGroupedSampler(step, lengths=lengths, generator=generator))


def _share(lengths, regime, sampler) -> float:
    order = sampler(torch.Generator().manual_seed(0))
    batches = [batch for _ in range(ORDERS) for batch in BatchSampler(order, regime.rows, drop_last=False)]
    return padding_share(lengths, batches)


def table(kept: dict[str, list[int]]) -> str:
    body = []
    for regime in regimes():
        lengths = kept[regime.data]
        sizes = len(lengths), round(sum(lengths) / len(lengths)), max(lengths)
        shares = (f"{share(lengths, regime):.1%}" for share in (at_random, grouped))
        batch = f"{regime.rows} x {regime.accumulation}"
        body.append((regime.data, *(f"{n:,}" for n in sizes), f"`configs/{regime.config}`", batch, *shares))
    head = (
        "data",
        "rows",
        "tokens, mean",
        "longest",
        "configuration",
        "rows x accumulation",
        "random order",
        "grouped",
    )
    return markdown(head, body)


def read_kept() -> dict[str, list[int]]:
    """The lengths of all rows, by data."""
    kept: dict[str, list[int]] = {}
    with open(KEPT, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kept.setdefault(row["data"], []).extend([int(row["tokens"])] * int(row["rows"]))
    return kept


def save(tokenizer: str, data: str) -> None:
    """Keeps how many rows have which length."""
    lines = []
    for name, files in FILES.items():
        rows = [row for file in files for row in load_rows(str(Path(data) / file))]
        counted = Counter(map(len, tokenize(rows, load_tokenizer(tokenizer))["input_ids"]))
        lines += [(name, *item) for item in sorted(counted.items())]
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with open(KEPT, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("data", "tokens", "rows"), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.padding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", nargs=2, metavar=("TOKENIZER", "DATA"), help="count the lengths first, and keep them")
    given = parser.parse_args().save
    if given:
        save(*given)
    made = table(read_kept())
    update(DOCUMENT, {"padding": made})
    print(made)


if __name__ == "__main__":
    main()
