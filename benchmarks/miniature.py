"""From the outcomes of the miniature comparisons to docs/miniature.md.

    rosa compare --config configs/miniature.yaml --jobs 2          every method, tuned alike
    rosa compare --config configs/miniature_why.yaml --jobs 2      what holds RoSA back
    rosa inspect --model runs/miniature/miniature/base-* --data runs/miniature/miniature/data-*/train.json \\
        --batch-size 64 --output runs/miniature/inspection         where the base's activations are
    python -m benchmarks.miniature --save                          keeps what came out in benchmarks/results
    python -m benchmarks.miniature                                 writes tables and picture from what is kept

The commands run in this order, in the repository's folder.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.document import update
from benchmarks.tables import markdown as markdown_table
from rosa.comparison.plan import Comparison, load_comparison
from rosa.comparison.report import OUTCOMES_NAME, k_ratio_points, read_outcomes
from rosa.comparison.run import best_rates
from rosa.comparison.statistics import Summary, summarise
from rosa.comparison.tables import markdown
from rosa.inspection.figures import draw_k_ratio
from rosa.miniature.make import SEEN_TASK

ROOT = Path(__file__).parent.parent
CONFIGS = {name: ROOT / "configs" / f"{name}.yaml" for name in ("miniature", "miniature_why")}
KEPT = {name: ROOT / "benchmarks" / "results" / name / OUTCOMES_NAME for name in CONFIGS}
ENERGY = KEPT["miniature"].with_name("energy_share.csv")
DOCUMENT = ROOT / "docs" / "miniature.md"
PICTURE = ROOT / "docs" / "miniature_k_ratio.png"


def parts() -> dict[str, str]:
    """The document's generated parts by name, from what is kept."""
    comparison, outcomes = kept("miniature")
    return {
        "table": markdown(summary(comparison, outcomes)).strip(),
        "rates": rates_table(comparison, outcomes),
        "run": about(outcomes),
        "why": markdown(summary(*kept("miniature_why"))).strip(),
        "energy": energy_table(),
    }


def kept(name: str) -> tuple[Comparison, list[dict[str, Any]]]:
    """A comparison's settings, and the outcomes that are kept of it."""
    return load_comparison(CONFIGS[name]), read_outcomes(KEPT[name])


def summary(comparison: Comparison, outcomes: Sequence[dict[str, Any]]) -> list[Summary]:
    """The rows of the table; all tasks but the mixture of seen skills make the micro-average."""
    base = outcomes_of(outcomes, "base")[0]
    averaged = [name for name in base["tasks"] if name != SEEN_TASK]
    return summarise(comparison, base["model"], outcomes, averaged)


def outcomes_of(outcomes: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The outcomes of one method."""
    return [outcome for outcome in outcomes if outcome["method"] == method]


def rates_table(comparison: Comparison, outcomes: Sequence[dict[str, Any]]) -> str:
    """The validation loss of every method at each learning rate; the chosen one in bold."""
    tried = [outcome for outcome in outcomes if outcome["settings"].get("seed") == comparison.tuning_seed]
    best = best_rates(tried)
    losses = {(o["method"], o["settings"]["learning_rate"]): o.get("validation_loss") for o in tried}
    body = []
    for method in comparison.methods:
        chosen = best[tried[0]["model"], method]
        body.append([method, *(_loss(losses[method, rate], rate == chosen) for rate in comparison.learning_rates)])
    return markdown_table(["method", *(f"{rate:g}" for rate in comparison.learning_rates)], body)


def energy_table() -> str:
    """The share of the base's activation energy in its low-frequency pairs, all layers together."""
    with open(ENERGY, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] == "all"]
    columns = ("uniform", "queries", "keys")
    body = [[row["r_low"], *(f"{100 * float(row[name]):.1f} %" for name in columns)] for row in rows]
    return markdown_table(("last r_low of the pairs", "if spread evenly", "queries", "keys"), body)


def about(outcomes: Sequence[dict[str, Any]]) -> str:
    """The machine and the packages of the run, and its size."""
    devices = sorted({outcome["device"] for outcome in outcomes})
    versions = ", ".join(f"{name} {version}" for name, version in outcomes[0]["versions"].items())
    base = outcomes_of(outcomes, "base")[0]
    trained = [outcome for outcome in outcomes if "steps" in outcome]
    return (
        f"{len(trained)} training runs of {trained[0]['steps']} steps on a base of {base['total']:,} parameters; "
        f"{'; '.join(devices)}; {versions}."
    )


def _loss(value: float | None, chosen: bool) -> str:
    if value is None:
        return "diverged"
    return f"**{value:.4f}**" if chosen else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep what came out of the runs first")
    if parser.parse_args().save:
        for name, config in CONFIGS.items():
            KEPT[name].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(load_comparison(config).output / OUTCOMES_NAME, KEPT[name])
        shutil.copyfile(load_comparison(CONFIGS["miniature"]).output / "inspection" / ENERGY.name, ENERGY)
    update(DOCUMENT, parts())
    comparison, outcomes = kept("miniature")
    draw_k_ratio(k_ratio_points(comparison, summary(comparison, outcomes)), PICTURE)


if __name__ == "__main__":
    main()
