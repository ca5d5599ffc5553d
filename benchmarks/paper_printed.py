"""The paper's printed tables (`configs/paper/*.csv`) against what can be computed: the trained shares of parameters by
counting, the micro-averages from the accuracies beside them."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.paper_counts import CONFIGS, MODELS, NEWER, WRITTEN, boft, methods, newer, sizes
from rosa.comparison.printed import MICRO, TRAINABLE, Printed, read_printed

# Test rows of each benchmark.
ROWS = {
    "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "ARC-Challenge": 1172, "ARC-Easy": 2376, "openbookqa": 500,
    "hellaswag": 10042, "winogrande": 1267, "MultiArith": 600, "gsm8k": 1319, "AddSub": 395, "AQuA": 254,
    "SingleEq": 508, "SVAMP": 1000, "mawps": 238,
}  # fmt: skip
ACCURACIES = {"Table 1": "table1_commonsense", "Table 3": "table3_arithmetic"}  # tables that print them by benchmark
ROUNDING = 0.1  # half a tenth in the average and, at worst, as much in what it is made of


def printed(name: str) -> Printed:
    """A table of `configs/paper`."""
    return read_printed(CONFIGS / f"{name}.csv")


def shares() -> dict[str, list[float]]:
    """Trained parameters in percent by method and in the order of MODELS: each method of the main tables, as printed
    and as written, and of the ablations those that train another number than RoSA. BOFT has both of its factors."""
    counts = {
        method: [boft(name, factors=2) if method == "BOFT" else sizes(name, method)[:2] for name in MODELS]
        for method in methods()
    }
    same = [method for method in counts if method != "RoSA" and counts[method] == counts["RoSA"]]
    return {
        method: [100 * number / total for number, total in row] for method, row in counts.items() if method not in same
    }


def printed_shares() -> dict[tuple[str, str], float]:
    """The printed shares by method and model of MODELS."""
    figures = printed("table1_commonsense").figures
    names = {name.lower(): name for name in MODELS}
    return {(method, names[model.lower()]): float(row[TRAINABLE]) for (model, method), row in figures.items()}


def averaged(accuracies: Mapping[str, float]) -> float:
    """The micro-average of accuracies by task, others than tasks left out."""
    tasks = [task for task in accuracies if task in ROWS]
    return sum(ROWS[task] * float(accuracies[task]) for task in tasks) / sum(ROWS[task] for task in tasks)


def differences(name: str) -> dict[tuple[str, str], float]:
    """Of each row of a printed table: its micro-average less that of its accuracies."""
    return {key: float(row[MICRO]) - averaged(row) for key, row in printed(name).figures.items()}


def parameters_table() -> str:
    theirs = printed_shares()
    rows = []
    for method, row in shares().items():
        cells = [f"{value:.3f}" for value in row]
        beside = [theirs.get((method.removesuffix(WRITTEN), name)) for name in MODELS]
        rows.append([method, *(c if b is None else f"{c} ({b:.3f})" for c, b in zip(cells, beside, strict=True))])
    return table(["trained, in % (printed)", *MODELS], rows)


def newer_table() -> str:
    theirs = {
        model.lower(): row[TRAINABLE]
        for (model, _), row in printed("dypam_arithmetic").figures.items()
        if TRAINABLE in row
    }
    cells = []
    for name in NEWER:
        number, total = newer(name)
        figure = next(figure for model, figure in theirs.items() if model.startswith(name.lower()))
        cells.append(f"{100 * number / total:.3f} ({figure})")
    return table(["trained, in % (printed)", *NEWER], [["RoSA", *cells]])


def averages_table() -> str:
    rows = []
    for title, name in ACCURACIES.items():
        found = differences(name)
        model, method = max(found, key=lambda key: abs(found[key]))
        beyond = [f"{method} on {model}" for (model, method), value in found.items() if abs(value) > ROUNDING]
        greatest = f"{found[model, method]:+.2f}, {method} on {model}"
        rows.append([title, f"{len(found)}", greatest, ", ".join(beyond) or "none"])
    return table(["table", "rows", "printed less computed, at most", "beyond rounding"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
