"""The table of a comparison, in the paper's form: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from rosa.comparison.overlap import told
from rosa.comparison.printed import MICRO, TRAINABLE
from rosa.comparison.statistics import Spread, Summary

GIGA = 1e9
LOSSES = {"validation_loss": "held-out loss", "forgetting_loss": "loss on other rows"}


def markdown(rows: Sequence[Summary]) -> str:
    """The table in Markdown, with what its columns mean below it."""
    header, *body = _cells(rows, "±", "-")
    lines = [header, ["---"] * len(header), *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_caption(rows)}\n"


def latex(rows: Sequence[Summary]) -> str:
    """The table as a LaTeX tabular, with rules of the package booktabs; the caption is a comment."""
    header, *body = [[_escaped(cell) for cell in line] for line in _cells(rows, r"$\pm$", "--")]
    lines = [" & ".join(line) + r" \\" for line in body]
    return "\n".join(
        [
            f"% {_caption(rows)}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def csv_table(rows: Sequence[Summary]) -> str:
    """The table's numbers in full, a row a method; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spreads = [*rows[0].tasks, "micro_average", *LOSSES, "difference"]
    names = [f"{name}{part}" for name in spreads for part in ("", "_sd", "_ci95")]
    columns = [name for name in (TRAINABLE, *rows[0].tasks, MICRO) if any(name in row.printed for row in rows)]
    names_beside = [f"{name}_{part}" for name in columns for part in ("printed", "minus_printed")]
    plain = ("method", "learning_rate", "trainable", "finished", "diverged")
    writer.writerow([*plain, *names, "p_value", "tokens_per_second", "peak_bytes", *names_beside])
    for row in rows:
        of_row = (*row.tasks.values(), row.micro, *(getattr(row, name) for name in LOSSES), row.difference)
        values = [v for spread in of_row for v in spread or (None,) * 3]
        known = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
        plain_values = [getattr(row, name) for name in plain]
        beside = [value for name in columns for value in (row.printed.get(name), _to_printed(row, name))]
        writer.writerow([*plain_values, *known, row.p_value, row.tokens_per_second, row.peak_bytes, *beside])
    return text.getvalue()


def _cells(rows: Sequence[Summary], plus_minus: str, nothing: str) -> list[list[str]]:
    """Header and rows as text."""
    on_gpu = any(row.peak_bytes is not None for row in rows)
    tasks = list(rows[0].tasks)
    tested = any(row.difference is not None for row in rows)
    losses = [name for name in LOSSES if any(getattr(row, name) is not None for row in rows)]
    header = ["method", "lr", "trainable %", *tasks, MICRO, *(LOSSES[name] for name in losses)]
    header += ["to the best baseline", "p"] * tested + ["tokens/s", "peak GB"] * on_gpu
    lines = [header]
    for row in rows:
        line = [
            row.method + (f" ({row.diverged} diverged)" if row.diverged else ""),
            nothing if row.learning_rate is None else f"{row.learning_rate:g}",
        ]
        line.append(f"{row.trainable:.3f}{_beside(row, TRAINABLE, 3)}")
        line += [f"{_spread(row.tasks[name], plus_minus)}{_beside(row, name)}" for name in tasks]
        line.append(f"{_spread(row.micro, plus_minus)}{_beside(row, MICRO)}")
        for loss in (getattr(row, name) for name in losses):
            line.append(nothing if loss is None else _spread(loss, plus_minus, digits=4))
        if tested:
            line += [nothing if row.difference is None else _signed(row.difference, plus_minus)]
            line += [nothing if row.p_value is None else f"{row.p_value:.3g}"]
        if on_gpu:
            rate, peak = row.tokens_per_second, row.peak_bytes
            line.append(nothing if rate is None else f"{rate:,.0f}")
            line.append(nothing if peak is None else f"{peak / GIGA:.1f}")
        lines.append(line)
    return lines


def _to_printed(row: Summary, name: str) -> float | None:
    """What was measured less what is printed, in percentage points."""
    if name not in row.printed:
        return None
    measured = {TRAINABLE: row.trainable, MICRO: row.micro.mean}
    return (measured[name] if name in measured else row.tasks[name].mean) - float(row.printed[name])


def _beside(row: Summary, name: str, digits: int = 1) -> str:
    """What stands behind a measured figure: the printed one and the difference to it, in brackets."""
    difference = _to_printed(row, name)
    return "" if difference is None else f" ({row.printed[name]}, {difference:+.{digits}f})"


def _spread(value: Spread, plus_minus: str, digits: int = 1) -> str:
    if math.isnan(value.deviation):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} {plus_minus} {value.deviation:.{digits}f}"


def _signed(value: Spread, plus_minus: str) -> str:
    if math.isnan(value.half_width):
        return f"{value.mean:+.1f}"
    return f"{value.mean:+.1f} {plus_minus} {value.half_width:.1f}"


def _caption(rows: Sequence[Summary]) -> str:
    counts = sorted({row.finished for row in rows if row.learning_rate is not None})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts == [1]:
        text = "Accuracy in percent, of one seed; the difference is to the baseline with the highest micro-average."
    else:
        text = (
            f"Accuracy in percent, mean and standard deviation over {seeds} seeds; the difference to the baseline with "
            "the highest micro-average is the mean over seeds with its 95 % interval, and p that of a paired t-test."
        )
    printed = "In brackets: the printed figure, and the difference to it." if any(row.printed for row in rows) else ""
    shares = {name: max(row.seen.get(name, 0.0) for row in rows) for row in rows for name in row.seen}
    return " ".join(filter(None, (text, printed, told(shares))))


def _escaped(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_").replace("&", r"\&")
