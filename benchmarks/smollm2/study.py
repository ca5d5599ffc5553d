"""The study on real weights: what is kept of its comparisons, as far as they have come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rosa.comparison.plan import BASE, Cell, Comparison, load_comparison
from rosa.comparison.run import best_rates

ROOT = Path(__file__).parents[2]
TASKS = ("arithmetic", "commonsense")
LONG = "arithmetic_long"
Outcome = dict[str, Any]


class Study:
    """A comparison, and the outcomes that are kept of it.

    Args:
        name (str): of its file in configs/smollm2: one of TASKS, or LONG.

    Attributes:
        comparison (Comparison): as its file describes it.
        tried (dict): of each method the outcomes by those of its learning rates that it has tried, at least one.
        rates (dict): the one of these that each method has chosen so far, or that its file gives it.
        tested (dict): of each method and the base, the outcomes that have reached the test.
    """

    def __init__(self, name: str):
        self.comparison: Comparison = load_comparison(ROOT / "configs" / "smollm2" / f"{name}.yaml")
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
        methods = self.comparison.methods.items()
        given = {name: options["learning_rate"] for name, options in methods if "learning_rate" in options}
        self.rates = given | {name: chosen[model, name] for name in self.tried}
        cells = {BASE: [self.comparison.base_cell(model)]} | {
            name: [self.comparison.cell(model, name, seed, rate) for seed in self.comparison.seeds]
            for name, rate in self.rates.items()
        }
        self.tested = {
            name: [o for cell in of_method if (o := self._tested(cell))] for name, of_method in cells.items()
        }

    def _tested(self, cell: Cell) -> Outcome | None:
        """The outcome of a cell that was tested; None of one that was made at a rate which another has surpassed."""
        outcome, rate = self._read(cell), cell.settings.get("learning_rate")
        fits = outcome and "tasks" in outcome and outcome["settings"].get("learning_rate") == rate
        return outcome if fits else None

    def _read(self, cell: Cell) -> Outcome | None:
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
