"""docs/position.md: its tables from the figures that `benchmarks.smollm2.position` keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.document import update
from benchmarks.tables import markdown
from rosa.storage.files import replace_text

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "position" / "figures.jsonl"
DOCUMENT = ROOT / "docs" / "position.md"
BASE = "base"
FAR = 2048
RUNS = {"short": 1, "long": 2333}  # the seeds of the study's short runs and of its long ones
BOUNDS = (0, 256, 1024, 2048, 3072, 4096)  # of the positions of a long row, by which its problems are told apart


def kept() -> list[dict[str, Any]]:
    """The figures of every model: the base's first, then by how far a shift moves the logits."""
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    return sorted(map(json.loads, lines), key=lambda model: (model["name"] != BASE, model["shifts"][-1]["mean_change"]))


def keep(model: dict[str, Any]) -> None:
    """Adds the figures of a model to those that are kept."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    replace_text(KEPT, "".join(json.dumps(one) + "\n" for one in (*kept(), model)))


def parts() -> dict[str, str]:
    """The document's generated parts by name: those of runs with other problems held out are not compared."""
    tables = {"logits": _logits, "loss": _loss, "places": _places, "alone": _alone}
    by_run = {run: [model for model in kept() if model["seed"] == seed] for run, seed in RUNS.items()}
    made = {f"{run}-{name}": table(models) for run, models in by_run.items() for name, table in tables.items()}
    return {"far": _far(by_run)} | made


def write() -> None:
    """Writes the document's tables."""
    update(DOCUMENT, parts())


def _logits(models: Sequence[dict[str, Any]]) -> str:
    shifts = [found["shift"] for found in models[0]["shifts"]]
    rows = [
        (
            model["name"],
            *(f"{found['mean_change']:.1e}" for found in model["shifts"]),
            f"{max(found['largest_change'] for found in model['shifts']):.1e}",
            *(f"{found['divergence']:.1e}" for found in model["shifts"]),
        )
        for model in models
    ]
    header = ("", *(f"logits, {s:+,}" for s in shifts), "largest", *(f"KL, {s:+,}" for s in shifts))
    return markdown(header, rows)


def _loss(models: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            model["name"],
            model["adapter"] and f"`{model['adapter']}`",
            f"{model['shifts'][0]['loss']:.4f}",
            *(f"{found['loss_shifted'] - found['loss']:+.1e}" for found in model["shifts"]),
        )
        for model in models
    ]
    shifts = (f"{found['shift']:+,}" for found in models[0]["shifts"])
    return markdown(("", "run", "loss", *shifts), rows)


def _places(models: Sequence[dict[str, Any]]) -> str:
    """Loss in the long row, against the base's there; and that of the same problems alone."""
    base = next(model for model in models if model["name"] == BASE)
    rows = [(base["name"], *(f"{_mean(b, 'in_row'):.3f} / {_mean(b, 'alone'):.3f}" for b in _buckets(base)))]
    for model in models:
        if model is not base:
            pairs = [list(zip(*pair, strict=True)) for pair in zip(_buckets(model), _buckets(base), strict=True)]
            rows.append((model["name"], *(f"{_gain(b, 'in_row')} / {_gain(b, 'alone')}" for b in pairs)))
    return markdown(("", *_headings(base)), rows)


def _alone(models: Sequence[dict[str, Any]]) -> str:
    """What the positions of the long row alone add to the loss of problems that stand alone."""
    rows = [(model["name"], *map(_added, _buckets(model))) for model in models]
    return markdown(("", *_headings(models[0])), rows)


def _buckets(model: dict[str, Any]) -> Iterator[list[dict[str, float]]]:
    """The problems of the long rows by where they begin."""
    for low, high in pairwise(BOUNDS):
        yield [problem for problem in model["places"] if low <= problem["at"] < high]


def _headings(model: dict[str, Any]) -> list[str]:
    return [
        f"{low:,} to {high:,} ({len(bucket)})"
        for (low, high), bucket in zip(pairwise(BOUNDS), _buckets(model), strict=True)
    ]


def _mean(problems: Sequence[dict[str, float]], which: str) -> float:
    return mean(problem[which] for problem in problems)


def _gain(pairs: Sequence[tuple[dict[str, float], dict[str, float]]], which: str) -> str:
    """The mean difference of problems to the base, and its standard error."""
    differences = [model[which] - base[which] for model, base in pairs]
    return f"{mean(differences):+.3f} ± {_error(differences):.3f}"


def _far(by_run: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """What being moved to the positions behind FAR takes from problems of what a model has learnt of them."""
    rows = []
    for run, models in by_run.items():
        base = next(model for model in models if model["name"] == BASE)
        for model in models:
            if model is not base:
                far, of_base = ([p for p in one["places"] if p["at"] >= FAR] for one in (model, base))
                gained = _mean(of_base, "alone") - _mean(far, "alone")
                lost = mean(problem["alone_there"] - problem["alone"] for problem in far)
                rows.append((model["name"], run, f"{gained:.3f}", _added(far), f"{100 * lost / gained:.1f} %"))
    return markdown(("", "run", "gained", f"lost behind {FAR:,}", "of it"), rows)


def _added(problems: Sequence[dict[str, float]]) -> str:
    """What being moved adds to the loss of problems: the mean, and its standard error."""
    added = [problem["alone_there"] - problem["alone"] for problem in problems]
    return f"{mean(added):+.1e} ± {_error(added):.0e}"


def _error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values))
