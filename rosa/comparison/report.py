"""What a comparison leaves for readers: the outcomes as data, and the tables and the picture made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosa.comparison.plan import Comparison, slug
from rosa.comparison.statistics import summarise
from rosa.comparison.tables import csv_table, latex, markdown

OUTCOMES_NAME = "outcomes.json"


def write_report(comparison: Comparison, outcomes: Sequence[dict[str, Any]]) -> list[Path]:
    """Write `outcomes.json`, and for each model its table as .md, .csv and .tex.

    Args:
        comparison (Comparison): with its models and tasks filled in.
        outcomes (sequence of dict): of all cells.

    Returns:
        list of Path: the files written; Markdown tables first.
    """
    folder = comparison.output
    written = []
    for model in comparison.models:
        rows = summarise(comparison, model, outcomes)
        if not rows:
            continue
        name = f"table-{slug(Path(model).name)}"
        for suffix, text in (("md", markdown(rows)), ("csv", csv_table(rows)), ("tex", latex(rows))):
            written.append(folder / f"{name}.{suffix}")
            written[-1].write_text(text, encoding="utf-8")
    data = folder / OUTCOMES_NAME
    data.write_text(json.dumps(list(outcomes), indent=1) + "\n", encoding="utf-8")
    return sorted([*written, data], key=lambda path: path.suffix != ".md")
