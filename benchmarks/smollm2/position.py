"""Whether what an adapter learnt depends on where a token stands: docs/position.md, from figures that are kept.

    python -m benchmarks.smollm2.position --adapters NAME=FOLDER ...   measures those that are not kept yet
    python -m benchmarks.smollm2.position                              writes the document's tables from what is kept

All is measured in float32 on the arithmetic problems that the run held out, which depend on its seed, the loss on the
tokens of the responses. FOLDER is a run of the study's `rosa compare` or of `benchmarks.smollm2.variants`. The base is
measured on the same problems first, if it is not kept.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import nn

from benchmarks.smollm2.held_out import Problem, held_out, losses, response_logits
from benchmarks.smollm2.position_tables import BASE, keep, kept, write
from benchmarks.smollm2.variants import COMMON, VARIANT_NAME, load
from rosa.adapters.pretrained import load_model
from rosa.data.tokens import IGNORED_LABEL

MODEL = "runs/smollm2/SmolLM2-135M-Instruct"
SHIFTS = (100, 1000, 4000)
LONG, LENGTH = 4, 4096  # long rows, and tokens of each
SHIFTED = 24  # problems whose positions are shifted
PACKAGES = ("torch", "transformers", "peft")


def seed_of(folder: Path) -> int:
    """The seed of an adapter's run, which tells what it has not learnt.

    Raises:
        ValueError: the folder is no run of the study.
    """
    if (folder / VARIANT_NAME).exists():
        return COMMON["seed"]
    if not (about := folder / "training.json").exists():
        raise ValueError(
            f"{folder} is no run of `rosa compare` or `benchmarks.smollm2.variants`: its seed is not known"
        )
    return json.loads(about.read_text(encoding="utf-8"))["seed"]


def long_rows(problems: Sequence[Problem], number: int, length: int) -> list[list[Problem]]:
    """Problems put one behind another: as many whole ones as fit into `length` tokens."""
    rows, room = [[]], length
    for problem in problems:
        if len(problem.ids) > room:
            rows.append([])
            room = length
        rows[-1].append(problem)
        room -= len(problem.ids)
    if len(rows) <= number:
        raise ValueError(f"{len(problems)} problems do not fill {number} rows of {length} tokens")
    return rows[:number]


def shifted(model: nn.Module, problems: Sequence[Problem], shifts: Sequence[int] = SHIFTS) -> list[dict[str, float]]:
    """How far shifts of all positions move the model, over the response tokens of problems that stand alone.

    Returns:
        list of dict: of each shift the mean and the largest change of a logit, the mean KL divergence of next-token
        distributions from those unshifted, and the mean losses without and with the shift.
    """
    found = {shift: Counter() for shift in shifts}
    for problem in problems:
        plain, labels = response_logits(model, [problem])
        log_p = plain.double().log_softmax(-1)  # in float32, rounding would make most of two near distributions' KL
        for shift, sums in found.items():
            moved, _ = response_logits(model, [problem], shift)
            change, log_q = (moved - plain).abs(), moved.double().log_softmax(-1)
            sums["tokens"] += len(labels)
            sums["mean_change"] += change.mean(-1).sum().item()
            sums["largest_change"] = max(sums["largest_change"], change.max().item())
            sums["divergence"] += (log_p.exp() * (log_p - log_q)).sum().item()
            sums["loss"] += F.nll_loss(log_p, labels, reduction="sum").item()
            sums["loss_shifted"] += F.nll_loss(log_q, labels, reduction="sum").item()
    return [{"shift": shift} | _means(sums) for shift, sums in found.items()]


def _means(sums: Counter) -> dict[str, float]:
    means = {name: sums[name] / sums["tokens"] for name in ("mean_change", "divergence", "loss", "loss_shifted")}
    return {"largest_change": sums["largest_change"], **means}


def by_place(model: nn.Module, rows: Sequence[Sequence[Problem]]) -> list[dict[str, float]]:
    """The loss of every problem of long rows: in the long row, alone from position 0 on, and alone at the positions
    that it has in the long row."""
    found = []
    for row in rows:
        at = 0
        for problem, in_row in zip(row, losses(model, row), strict=True):
            (alone,), (moved,) = losses(model, [problem]), losses(model, [problem], at)
            tokens = sum(label != IGNORED_LABEL for label in problem.labels)
            found.append({"at": at, "tokens": tokens, "in_row": in_row, "alone": alone, "alone_there": moved})
            at += len(problem.ids)
    return found


def measure(model: nn.Module, problems: Sequence[Problem]) -> dict[str, Any]:
    """All figures of a model, in its own dtype."""
    model.eval()
    return {
        "shifts": shifted(model, problems[:SHIFTED]),
        "places": by_place(model, long_rows(problems, LONG, LENGTH)),
    }


def figures(name: str, folder: Path | None, seed: int) -> dict[str, Any]:
    """What is kept of the base, or of an adapter of it, on the problems that runs with a seed hold out."""
    model = load_model(MODEL, dtype="float32")
    if folder is not None:
        model = load(model, folder).float()
    about = {
        "name": name,
        "adapter": folder and "/".join(folder.parts[-2:]),  # method and run
        "seed": seed,
        "dtype": "float32",
        "versions": {package: version(package) for package in PACKAGES},
    }
    return about | measure(model, held_out(MODEL, seed))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2.position",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", nargs="+", default=[], metavar="NAME=FOLDER", help="measure these")
    adapters = [_named(given, parser) for given in parser.parse_args().adapters]
    for name, folder, seed in adapters:
        for wanted, at in ((BASE, None), (name, folder)):
            if (wanted, seed) not in {(model["name"], model["seed"]) for model in kept()}:
                keep(figures(wanted, at, seed))
                print(f"{wanted} measured", flush=True)
    write()


def _named(given: str, parser: argparse.ArgumentParser) -> tuple[str, Path, int]:
    """Name, folder and seed of an adapter."""
    name, equals, folder = given.rpartition("=")
    if not (name and equals and Path(folder).is_dir()):
        parser.error(f"--adapters takes NAME=FOLDER, an adapter's folder, got {given}")
    try:
        return name, Path(folder), seed_of(Path(folder))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
