"""From the kept outcomes of the study on real weights to docs/results.md and the README.

    make base
    rosa compare --config configs/smollm2/arithmetic.yaml          both tasks; finished cells are kept, others are run
    rosa compare --config configs/smollm2/commonsense.yaml
    rosa compare --config configs/smollm2/arithmetic_long.yaml     three epochs
    python -m benchmarks.smollm2.answers                           their answers, question by question
    python -m benchmarks.smollm2.report                            writes the tables and the pictures

A study that is not finished is reported as far as it has come.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.document import update
from benchmarks.smollm2 import answers, variants
from benchmarks.smollm2.study import LONG, ROOT, TASKS, Outcome, Study, losses
from benchmarks.tables import markdown
from rosa.comparison.plan import BASE
from rosa.comparison.statistics import spread
from rosa.demo.figure import LINE_COLOURS
from rosa.inspection.run_figure import draw_run
from rosa.selection.log import read_entry

INSPECTION = ROOT / "benchmarks" / "results" / "smollm2" / "inspection"
COURSES, LAYERS = ROOT / "docs" / "results_course.png", ROOT / "docs" / "results_layers.png"
DOCUMENT, README = ROOT / "docs" / "results.md", ROOT / "README.md"
OTHERS = "#5f6b76"
COLOURS = {  # Okabe and Ito's
    **LINE_COLOURS, "RoAE only": "#E69F00", "RoAd_2": "#009E73", "LN tuning": "#CC79A7",
}  # fmt: skip


def short_table(study: Study) -> str:
    """A row for each method at its chosen rate in the short runs, the lowest loss first."""
    body = [[BASE, "-", "-", "0", "-", _start(study)]]
    for name in _ranked(study):
        outcome = study.short(name)
        course = losses(outcome)
        half = f"{course[50]:.4f}" if 50 in course else "-"
        tried = f"{len(study.tried[name])} of {len(study.comparison.rates(name))}"
        body.append([name, f"{study.rates[name]:g}", tried, _share(outcome), half, _loss(outcome)])
    return markdown(("method", "lr", "rates tried", "trainable %", "loss after 50 steps", "after 100"), body)


def readme_table(studies: dict[str, Study]) -> str:
    """A row for each method that was tried on arithmetic, variations of its settings aside (a comma is in their names):
    the loss of short runs, loss and accuracy of long ones."""
    short, long = studies["arithmetic"], studies[LONG]
    body = [[BASE, "0", _start(short), "-", _tested_accuracy(long, BASE)]]
    for name in (name for name in _ranked(short) if "," not in name):
        outcome = short.short(name)
        end = _loss(long.tested[name][0]) if long.tested.get(name) else "-"
        body.append([name, _share(outcome), _loss(outcome), end, _tested_accuracy(long, name)])
    header = ("method", "trainable %", "loss after 100 steps", "loss after three epochs", "accuracy % after these")
    return markdown(header, body)


def _ranked(study: Study) -> list[str]:
    """The methods that have been tried, the lowest loss of the short runs first."""
    return sorted(study.tried, key=lambda name: study.short(name).get("validation_loss", math.inf))


def _start(study: Study) -> str:
    return "-" if study.start is None else f"{study.start:.4f}"


def _tested_accuracy(study: Study, name: str) -> str:
    outcomes = study.tested.get(name)
    return _with_deviation(_micro(outcomes, study.comparison.tasks.split(","))) if outcomes else "-"


def tested_table(study: Study) -> str:
    """A row for each method that has been tested: loss, accuracies, and the loss on the other task's rows."""
    tasks = study.comparison.tasks.split(",")
    tested = {name: outcomes for name, outcomes in study.tested.items() if outcomes}
    ranked = sorted(tested, key=lambda name: -_micro(tested[name], tasks).mean)
    body = []
    for name in ranked:
        outcomes = tested[name]
        accuracies = [spread([_accuracy(o["tasks"][task]) for o in outcomes]).mean for task in tasks]
        known = [_loss(outcome) for outcome in outcomes if name != BASE]
        body.append(
            [
                name,
                "-" if name == BASE else str(len(outcomes)),
                ", ".join(known) or "-",
                *(f"{accuracy:.1f}" for accuracy in accuracies),
                _with_deviation(_micro(outcomes, tasks)),
                f"{statistics.fmean(o['forgetting_loss'] for o in outcomes):.3f}",
            ]
        )
    return markdown(("method", "seeds", "loss, by seed", *tasks, "micro-average", "loss on the other task"), body)


def rates_table(study: Study) -> str:
    """The loss of every method at each learning rate after the short run; the chosen one in bold, and with an asterisk
    where it is the lowest or the highest that was tried."""
    grid = sorted({rate for by_rate in study.tried.values() for rate in by_rate})
    body = []
    for name, by_rate in study.tried.items():
        cells = [_loss(by_rate[rate]) if rate in by_rate else "" for rate in grid]
        chosen = grid.index(study.rates[name])
        edge = study.rates[name] in (min(by_rate), max(by_rate))
        cells[chosen] = f"**{cells[chosen]}**{' *' if edge else ''}"
        body.append([name, *cells])
    return markdown(("method", *(f"{rate:g}" for rate in grid)), body)


def energy_table() -> str:
    """The share of the base's activation energy in its low-frequency pairs: all layers together, and the extremes."""
    with open(INSPECTION / "energy_share.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    body = []
    for together in (row for row in rows if row["layer"] == "all"):
        layers = [row for row in rows if row["r_low"] == together["r_low"] and row["layer"] != "all"]
        ends = [pick(layers, key=lambda row: float(row["both"])) for pick in (min, max)]
        shares = [f"{100 * float(together[name]):.1f} %" for name in ("uniform", "queries", "keys")]
        extremes = [f"{100 * float(end['both']):.1f} % (layer {end['layer']})" for end in ends]
        body.append([together["r_low"], *shares, *extremes])
    header = ("last r_low of the pairs", "if spread evenly", "queries", "keys", "least layer", "greatest layer")
    return markdown(header, body)


def gains_text() -> str:
    """What `rosa inspect` printed of the adapters' gains."""
    files = sorted(INSPECTION.glob("gains-*.txt"))
    return "\n".join(f"{file.stem.removeprefix('gains-')}:\n\n```\n{file.read_text().strip()}\n```" for file in files)


def about(studies: Sequence[Study]) -> str:
    """The size of the study, the machine and the packages."""
    outcomes = [outcome for study in studies for outcome in study.outcomes if "steps" in outcome]
    devices = sorted({outcome["device"] for outcome in outcomes})
    versions = ", ".join(f"{name} {version}" for name, version in outcomes[0]["versions"].items())
    steps = sum(outcome["steps"] for outcome in outcomes)
    rates = [
        log["train_steps_per_second"] for o in outcomes for log in o["course"] if log.get("train_steps_per_second")
    ]
    seconds = (
        f"{statistics.median(1 / rate for rate in rates):.0f} s a step with its evaluations in the median of the runs"
    )
    return (
        f"{len(outcomes)} training runs, {steps:,} steps of 4 rows; {'; '.join(devices)}, bfloat16, {seconds} "
        f"({1 / max(rates):.0f} to {1 / min(rates):.0f}); {versions}."
    )


def epochs_table(study: Study) -> str:
    """Of the long runs, the loss on held-out rows at the end of each epoch, and where it was lowest."""
    runs = {name: outcomes[0] for name, outcomes in study.tested.items() if outcomes and name != BASE}
    body = []
    for name in sorted(runs, key=lambda name: _loss_at_end(runs[name])):
        outcome = runs[name]
        course, steps = losses(outcome), outcome["steps"]
        lowest = min(course, key=course.__getitem__)
        ends = [f"{course[steps * epoch // 3]:.4f}" for epoch in (1, 2, 3)]
        row = [name, f"{study.rates[name]:g}", _share(outcome), *ends, f"{course[lowest]:.4f} at {lowest:,}"]
        body.append(row)
    header = ("method", "lr", "trainable %", "loss after 1 epoch", "after 2", "after 3", "lowest, at step")
    return markdown(header, body)


def layers_table(study: Study) -> str:
    """How often layer selection chose which layers by their score, in RoSA's first run."""
    outcome = study.tested["RoSA"][0]
    found = [entry for entry in map(read_entry, outcome["course"]) if entry is not None]
    by_score = [made for made, _ in found if made.exploited]
    layers = found[0][1]
    shares = {layer: statistics.fmean(layer in made.layers for made in by_score) for layer in layers}
    bands = {
        f"all {len(by_score)}": (1, 2),
        "80 to 99 %": (0.8, 1),
        "50 to 79 %": (0.5, 0.8),
        "20 to 49 %": (0.2, 0.5),
        "fewer": (0, 0.2),
    }
    body = [
        [title, ", ".join(str(layer) for layer in layers if least <= shares[layer] < below)]
        for title, (least, below) in bands.items()
    ]
    return markdown((f"of the {len(by_score)} selections by score, out of {len(found)}", "chose the layers"), body)


def courses(short: Study, long: Study) -> Figure:
    """Loss on held-out rows: after 50 and 100 steps of every method at its chosen rate; and against steps, of the runs
    that were tested, those of the first seed."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplot_mosaic([["short", "tested"], ["short", "epochs"]])
    ranked = list(reversed(_ranked(short)))
    for row, name in enumerate(ranked):
        course, colour = losses(short.short(name)), COLOURS.get(name, OTHERS)
        # A run that diverged has no loss there, and no dot.
        points = [course.get(step, math.nan) for step in (50, 100)]
        panels["short"].plot(points, [row, row], color=colour, linewidth=1)
        panels["short"].scatter(points, [row, row], s=36, facecolors=["white", colour], edgecolors=colour, zorder=2)
    panels["short"].set_yticks(range(len(ranked)), ranked)
    panels["short"].set_title("after 50 steps (hollow) and 100 steps (filled)", loc="left", fontsize=11)
    panels["short"].set_xlabel("loss on held-out rows")
    for panel, title, study in (("tested", "300 steps", short), ("epochs", "three epochs", long)):
        _draw_tested(panels[panel], study)
        panels[panel].set_title(title, loc="left", fontsize=11)
    for axes in panels.values():
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_tested(axes: Axes, study: Study) -> None:
    runs = {name: outcomes[0] for name, outcomes in study.tested.items() if outcomes and name != BASE}
    for name in sorted(runs, key=lambda name: -_loss_at_end(runs[name])):
        points = [(step, loss) for step, loss in losses(runs[name]).items() if step > 0]
        axes.plot(*zip(*points, strict=True), color=COLOURS.get(name, OTHERS), label=name, marker="o", markersize=3)
    axes.set_xlabel("steps of 4 rows")
    axes.set_ylabel("loss on held-out rows")
    axes.legend(frameon=False, fontsize=9)


def _loss_at_end(outcome: Outcome) -> float:
    return losses(outcome)[outcome["steps"]]


def draw_layers(study: Study, path: Path = LAYERS) -> None:
    """RoSA's first run: its losses and rate, and the layers that trained."""
    draw_run(study.tested["RoSA"][0]["course"], path)


def _share(outcome: Outcome) -> str:
    return f"{100 * outcome['trainable'] / outcome['total']:.3f}"


def _loss(outcome: Outcome) -> str:
    loss = outcome.get("validation_loss")
    return "diverged" if loss is None or math.isnan(loss) else f"{loss:.4f}"


def _accuracy(counts: dict[str, int]) -> float:
    return 100 * counts["correct"] / counts["total"]


def _micro(outcomes: Sequence[Outcome], tasks: Sequence[str]):
    parts = [[o["tasks"][task] for task in tasks] for o in outcomes]
    return spread([100 * sum(p["correct"] for p in of) / sum(p["total"] for p in of) for of in parts])


def _with_deviation(value) -> str:
    return f"{value.mean:.1f}" if math.isnan(value.deviation) else f"{value.mean:.1f} ± {value.deviation:.1f}"


def read() -> dict[str, Study]:
    """The comparisons by name."""
    return {name: Study(name) for name in (*TASKS, LONG)}


def parts(studies: dict[str, Study]) -> dict[Path, dict[str, str]]:
    """The documents' generated parts by name."""
    made = {
        "run": about(list(studies.values())),
        "energy": energy_table(),
        "gains": gains_text(),
        "why": variants.table(),
        "epochs": epochs_table(studies[LONG]),
        "layers": layers_table(studies[LONG]),
        "likeness": answers.likeness_table(answers.read(LONG)),
    }
    for task in TASKS:
        for name, table in (("short", short_table), ("rates", rates_table)):
            made[f"{task}-{name}"] = table(studies[task])
    made |= {f"{name}-pairs": answers.pairs_table(answers.read(name)) for name in answers.COMPARISONS}
    made |= {f"{name}-tested": tested_table(studies[name]) for name in studies}
    return {DOCUMENT: made, README: {"real": readme_table(studies)}}


def main() -> None:
    """Write the documents and draw the pictures."""
    studies = read()
    for file, made in parts(studies).items():
        update(file, made)
    courses(studies["arithmetic"], studies[LONG]).savefig(COURSES, dpi=150)
    draw_layers(studies[LONG])


if __name__ == "__main__":
    main()
