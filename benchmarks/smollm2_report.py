"""From the kept outcomes of the study on real weights to docs/results.md and the README.

    make base
    rosa compare --config configs/smollm2/arithmetic.yaml          both tasks; finished cells are kept, others are run
    rosa compare --config configs/smollm2/commonsense.yaml
    python -m benchmarks.smollm2_report                            writes the tables and the pictures

A study that is not finished is reported as far as it has come.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import roae_variants
from benchmarks.document import update
from benchmarks.tables import markdown
from rosa.comparison.plan import BASE, Comparison, load_comparison
from rosa.comparison.run import best_rates
from rosa.comparison.statistics import spread

ROOT = Path(__file__).parent.parent
TASKS = ("arithmetic", "commonsense")
INSPECTION = ROOT / "benchmarks" / "results" / "smollm2" / "inspection"
PICTURE = ROOT / "docs" / "results_course.png"
DOCUMENT, README = ROOT / "docs" / "results.md", ROOT / "README.md"
DRAWN = {  # the lines that are told apart by colour (Okabe and Ito's); the others are grey
    "RoSA": "#D55E00", "RoAE only, alpha 1": "#E69F00", "LoRA": "#0072B2", "LoRA on q and k": "#56B4E9",
    "RoAd_2": "#009E73", "LN tuning": "#CC79A7",
}  # fmt: skip
Outcome = dict[str, Any]


class Study:
    """One task's comparison, and the outcomes that are kept of it.

    Args:
        task (str): one of TASKS.

    Attributes:
        comparison (Comparison): as its file describes it.
        tried (dict): of each method the outcomes by those of its learning rates that it has tried, at least one.
        rates (dict): the one of these that each method has chosen so far.
        tested (dict): of each method and the base, the outcomes that have reached the test.
    """

    def __init__(self, task: str):
        self.comparison: Comparison = load_comparison(ROOT / "configs" / "smollm2" / f"{task}.yaml")
        (model,) = self.comparison.models
        tried = {
            name: {
                rate: outcome
                for rate in self.comparison.rates(name)
                if (outcome := self._read(self.comparison.tuning_cell(model, name, rate)))
            }
            for name in self.comparison.methods
        }
        self.tried = {name: by_rate for name, by_rate in tried.items() if by_rate}
        chosen = best_rates([outcome for by_rate in self.tried.values() for outcome in by_rate.values()])
        self.rates = {name: chosen[model, name] for name in self.tried}
        cells = {BASE: [self.comparison.base_cell(model)]} | {
            name: [self.comparison.cell(model, name, seed, rate) for seed in self.comparison.seeds]
            for name, rate in self.rates.items()
        }
        found = {name: [o for cell in of_method if (o := self._read(cell))] for name, of_method in cells.items()}
        self.tested = {name: [o for o in outcomes if "tasks" in o] for name, outcomes in found.items()}

    def _read(self, cell) -> Outcome | None:
        file = ROOT / cell.folder / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def short(self, method: str) -> Outcome:
        """The short run of a method at the rate that it has chosen."""
        return self.tried[method][self.rates[method]]

    @property
    def outcomes(self) -> list[Outcome]:
        """All of them."""
        short = [outcome for by_rate in self.tried.values() for outcome in by_rate.values()]
        return short + [outcome for outcomes in self.tested.values() for outcome in outcomes]

    @property
    def start(self) -> float | None:
        """The loss before the first step, where a run has measured it."""
        for by_rate in self.tried.values():
            for outcome in by_rate.values():
                if 0 in losses(outcome):
                    return losses(outcome)[0]
        return None


def losses(outcome: Outcome) -> dict[int, float]:
    """The loss on held-out rows by the number of steps, as it was measured while a run trained."""
    return {entry["step"]: entry["eval_loss"] for entry in outcome.get("course", ()) if "eval_loss" in entry}


def short_table(study: Study) -> str:
    """A row for each method at its chosen rate in the short runs, the lowest loss first."""
    ranked = sorted(study.rates, key=lambda name: study.short(name).get("validation_loss", math.inf))
    body = [["base", "-", "-", "0", "-", "-" if study.start is None else f"{study.start:.4f}"]]
    for name in ranked:
        outcome = study.short(name)
        course = losses(outcome)
        half = f"{course[50]:.4f}" if 50 in course else "-"
        tried = f"{len(study.tried[name])} of {len(study.comparison.rates(name))}"
        body.append([name, f"{study.rates[name]:g}", tried, _share(outcome), half, _loss(outcome)])
    return markdown(("method", "lr", "rates tried", "trainable %", "loss after 50 steps", "after 100"), body)


def readme_table(studies: dict[str, Study]) -> str:
    """Of both tasks, a row for each method that has been tried: the loss of the short run, and what the test gave."""
    begun = {task: study for task, study in studies.items() if study.rates}
    first = next(iter(begun.values()))
    names = [BASE, *sorted(first.rates, key=lambda name: first.short(name).get("validation_loss", math.inf))]
    header = ["method", "trainable %"]
    for task in begun:
        header += [f"{task}: loss", "accuracy %"]
    body = []
    for name in names:
        row = [name, "0" if name == BASE else _share(first.short(name))]
        for study in begun.values():
            row += [_short_loss(study, name), _tested_accuracy(study, name)]
        body.append(row)
    return markdown(header, body)


def _short_loss(study: Study, name: str) -> str:
    if name == BASE:
        return "-" if study.start is None else f"{study.start:.4f}"
    return _loss(study.short(name)) if name in study.rates else "-"


def _tested_accuracy(study: Study, name: str) -> str:
    outcomes = study.tested.get(name)
    return _with_deviation(_micro(outcomes, study.comparison.tasks.split(","))) if outcomes else "-"


def long_table(study: Study) -> str:
    """A row for each method that has been tested: loss, accuracies, and the loss on the other task's rows."""
    if not any(study.tested.values()):
        return "Not run yet."
    tasks = study.comparison.tasks.split(",")
    tested = {name: outcomes for name, outcomes in study.tested.items() if outcomes}
    ranked = sorted(tested, key=lambda name: -_micro(tested[name], tasks).mean)
    body = []
    for name in ranked:
        outcomes = tested[name]
        accuracies = [spread([_accuracy(o["tasks"][task]) for o in outcomes]).mean for task in tasks]
        # Other rows are held out with another seed, so the losses of one seed alone compare.
        known = [o["validation_loss"] for o in outcomes if o.get("seed") == study.comparison.seeds[0]]
        body.append(
            [
                name,
                "-" if name == BASE else str(len(outcomes)),
                f"{known[0]:.4f}" if known else "-",
                *(f"{accuracy:.1f}" for accuracy in accuracies),
                _with_deviation(_micro(outcomes, tasks)),
                f"{statistics.fmean(o['forgetting_loss'] for o in outcomes):.3f}",
            ]
        )
    return markdown(("method", "seeds", "loss", *tasks, "micro-average", "loss on the other task"), body)


def rates_table(study: Study) -> str:
    """The loss of every method at each learning rate after the short run; the chosen one in bold."""
    grid = sorted({rate for by_rate in study.tried.values() for rate in by_rate})
    body = []
    for name, by_rate in study.tried.items():
        cells = [_loss(by_rate[rate]) if rate in by_rate else "" for rate in grid]
        chosen = grid.index(study.rates[name])
        cells[chosen] = f"**{cells[chosen]}**"
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
    return f"{len(outcomes)} training runs, {steps:,} steps of 4 rows; {'; '.join(devices)}, bfloat16; {versions}."


def draw_courses(studies: dict[str, Study], path: Path = PICTURE) -> None:
    """Loss on held-out rows against steps: the short runs at their chosen rates, and the long ones."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, len(studies), squeeze=False)[0]
    for axes, (task, study) in zip(panels, studies.items(), strict=True):
        for name in study.rates:
            runs = study.tested.get(name, [])[:1] or [study.short(name)]
            _draw_course(axes, study, name, [losses(run) for run in runs])
        axes.set_title(task, loc="left", fontsize=11)
        axes.set_xlabel("steps of 4 rows")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss on held-out rows")
    most = max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    most.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_course(axes: Axes, study: Study, name: str, runs: Sequence[dict[int, float]]) -> None:
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    points = [(step, statistics.fmean(run[step] for run in runs)) for step in steps]
    if study.start is not None and 0 not in steps:
        points = [(0, study.start), *points]
    style = {"color": DRAWN[name], "label": name} if name in DRAWN else {"color": "#c9cdd2", "linewidth": 1}
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)


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


def parts() -> dict[Path, dict[str, str]]:
    """The documents' generated parts by name, from what is kept."""
    studies = {task: Study(task) for task in TASKS}
    begun = {task: study for task, study in studies.items() if study.rates}
    made = {
        "run": about(list(begun.values())),
        "energy": energy_table(),
        "gains": gains_text(),
        "why": roae_variants.table(),
    }
    for task, study in studies.items():
        for name, table in (("short", short_table), ("long", long_table), ("rates", rates_table)):
            made[f"{task}-{name}"] = table(study) if task in begun else "Not run yet."
    return {DOCUMENT: made, README: {"real": readme_table(studies)}}


def main() -> None:
    """Write the documents and draw the picture."""
    for file, made in parts().items():
        update(file, made)
    draw_courses({task: study for task in TASKS if (study := Study(task)).rates})


if __name__ == "__main__":
    main()
