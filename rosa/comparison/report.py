"""What a comparison leaves for readers: the outcomes as data, and the tables and the picture made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosa.comparison.plan import GRID, Comparison, slug
from rosa.comparison.statistics import Summary, summarise
from rosa.comparison.tables import csv_table, latex, markdown
from rosa.evaluation.tasks import find_tasks
from rosa.inspection.figures import draw_k_ratio
from rosa.storage.files import replace_text
from rosa.training.methods import ROSA

OUTCOMES_NAME = "outcomes.jsonl"


def write_report(comparison: Comparison, outcomes: Sequence[dict[str, Any]]) -> list[Path]:
    """Write `outcomes.jsonl`, for each model its table as .md, .csv and .tex, and a picture if k_ratio varies.

    Args:
        comparison (Comparison): with its models and tasks filled in.
        outcomes (sequence of dict): of all cells.

    Returns:
        list of Path: the files written; Markdown tables first.
    """
    folder = comparison.output
    written = []
    averaged = [task.name for task in find_tasks(comparison.tasks, comparison.data_dir)]
    for model in comparison.models:
        rows = summarise(comparison, model, outcomes, averaged)
        if not rows:
            continue
        name = f"table-{slug(Path(model).name)}"
        for suffix, text in (("md", markdown(rows)), ("csv", csv_table(rows)), ("tex", latex(rows))):
            written.append(folder / f"{name}.{suffix}")
            replace_text(written[-1], text)
        points = k_ratio_points(comparison, rows)
        if len(points) > 2:
            written.append(folder / f"k_ratio-{slug(Path(model).name)}.png")
            draw_k_ratio(points, written[-1])
    data = folder / OUTCOMES_NAME
    replace_text(data, "".join(json.dumps(outcome) + "\n" for outcome in outcomes))
    return sorted([*written, data], key=lambda path: path.suffix != ".md")


def read_outcomes(file: Path) -> list[dict[str, Any]]:
    """The outcomes that `write_report` wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def k_ratio_points(comparison: Comparison, rows: Sequence[Summary]) -> list[tuple[float, float, float]]:
    """Of the methods that differ from RoSA in k_ratio alone: k_ratio, the micro-average's mean in percent, and half the
    width of its 95 % interval; without layer selection all layers train."""
    points = {}
    for row in rows:
        own = comparison.methods.get(row.method)
        options = {**comparison.train, **(own or {})}
        if own is None or own.keys() - {GRID, "dls", "dls_k_ratio"} or options.get("method", ROSA) != ROSA:
            continue
        share = float(options.get("dls_k_ratio", 0.5)) if options.get("dls", True) else 1.0
        points[share] = (share, row.micro.mean, row.micro.half_width)
    return [points[share] for share in sorted(points)]
