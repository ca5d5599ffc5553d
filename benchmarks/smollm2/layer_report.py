"""Makes the tables and the picture of docs/layers.md from the runs of `benchmarks.smollm2.layer_choice`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import rosa
from benchmarks.charts import DPI
from benchmarks.document import update
from benchmarks.results import RESULTS
from benchmarks.scaling import MODELS
from benchmarks.smollm2.layer_rules import RULES
from benchmarks.smollm2.step_flops import TYPICAL, step_flops
from benchmarks.tables import markdown

KEPT = RESULTS / "layer_choice"
DOCS = Path(__file__).parents[2] / "docs"
DOCUMENT, PICTURE = DOCS / "layers.md", DOCS / "layer_choice.png"
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
STEPS, BEFORE = 100, 50  # of a run, and of these the last at which all runs are measured before the rate falls
LAYERS = SMOLLM2.num_hidden_layers
TERA = 1e12
TARGETS = {"arithmetic": 0.53, "commonsense": 0.22}  # losses that nearly every rule comes to, by task
COLORS = {
    "all": "#000000", "paper": "#c8553d", "by_cost": "#1d6a96", "upper": "#e0a458", "block_by_cost": "#5b8c5a",
    "relative": "#b08ea2", "block": "#9e9e9e",
}  # fmt: skip


class Run(NamedTuple):
    """What is kept of a run: evaluations (step, flops, loss) and selections (step, layers, exploited, scores)."""

    task: str
    rule: str
    seed: int
    evaluations: list[dict]
    selections: list[dict]

    @property
    def last(self) -> dict:
        return self.evaluations[-1]

    @property
    def lowest(self) -> float | None:
        """The lowest layer that trains between selections, in the mean of the selections that were put to use."""
        used = [min(made["layers"]) for made in self.selections if made["step"] < self.last["step"]]
        if not RULES[self.rule].selects:
            return float(round(RULES[self.rule].adapted[0] * LAYERS))
        return sum(used) / len(used) if used else None

    @property
    def end(self) -> dict | None:
        """The evaluation after the last step, past the fall of the rate; None of a run that has not come to it."""
        return self.last if self.last["step"] == steps_of(self.rule) else None

    def at(self, step: int) -> dict | None:
        """The evaluation after so many steps."""
        return next((evaluation for evaluation in self.evaluations if evaluation["step"] == step), None)

    def flops_to(self, loss: float) -> float | None:
        """The operations until the loss first fell to this one, on the line between the evaluations before and after;
        None of a run that did not come to it, and of one that was there at its first evaluation."""
        if self.evaluations[0]["loss"] <= loss:
            return None
        for before, after in itertools.pairwise(self.evaluations):
            if before["loss"] > loss >= after["loss"]:
                share = (before["loss"] - loss) / (before["loss"] - after["loss"])
                return before["flops"] + share * (after["flops"] - before["flops"])
        return None


def steps_of(rule: str) -> int:
    """How many steps a run by one of RULES takes."""
    return round(STEPS * RULES[rule].length)


def course_file(task: str, rule: str, seed: int) -> Path:
    """Where the course of a run is kept."""
    return KEPT / task / f"{rule}-{seed}.jsonl"


def read_run(task: str, rule: str, seed: int) -> Run | None:
    """A run as far as it has come; None where nothing is kept."""
    file = course_file(task, rule, seed)
    if not file.exists():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Run(task, rule, seed, [e for e in lines if "loss" in e], [s for s in lines if "layers" in s])


def steps_made(task: str, rule: str, seed: int) -> int:
    """How many steps a run has made, as far as it is kept."""
    run = read_run(task, rule, seed)
    return run.last["step"] if run else 0


def kept_groups() -> list[list[Run]]:
    """All runs, those of one task and seed together, in the order of the rules."""
    groups = sorted({(file.parent.name, int(file.stem.rpartition("-")[2])) for file in KEPT.glob("*/*.jsonl")})
    found = [[read_run(task, rule, seed) for rule in RULES] for task, seed in groups]
    return [[run for run in group if run] for group in found]


def savings() -> str:
    """A step's operations by which layers train, as a share of those where all do."""
    models = {"SmolLM2-135M": SMOLLM2, "Qwen2.5-7B": MODELS["Qwen2.5-7B"]}
    shares = [_shares(config) for config in models.values()]
    return markdown(("layers that train", *models), [(name, *(s[name] for s in shares)) for name in shares[0]])


def _shares(config: PreTrainedConfig) -> dict[str, str]:
    with torch.device("meta"):
        products = step_flops(rosa.patch(AutoModelForCausalLM.from_config(config)))
    layers = range(len(products.linears))
    half, quarter = len(layers) // 2, len(layers) // 4
    trained = {
        "all": layers,
        "half of them, layer 0 among them": layers[:half],
        "half of them, from a quarter of the way up": layers[quarter : quarter + half],
        "the upper half": layers[-half:],
        "the upper quarter": layers[-quarter:],
    }
    step = {name: products.forward(TYPICAL) + products.backward(TYPICAL, some) for name, some in trained.items()}
    return {name: f"{operations / step['all']:.1%}" for name, operations in step.items()}


def parts() -> dict[str, str]:
    """The page's generated parts by name."""
    return {"savings": savings(), "layers": table(kept_groups())}


def table(groups: Sequence[Sequence[Run]]) -> str:
    """What each rule came to: before the rate falls, and at its end."""
    head = (
        "task, seed", "rule", "lowest layer, mean", f"loss after {BEFORE} steps", "TFLOP", "steps in all",
        "loss at the end", "TFLOP", "of all layers'", "TFLOP until a loss of",
    )  # fmt: skip
    return markdown(head, [_line(run, group) for group in groups for run in group])


def _line(run: Run, group: Sequence[Run]) -> tuple:
    whole = next((other.end for other in group if other.rule == "all"), None)
    share = f"{run.end['flops'] / whole['flops']:.0%}" if run.end and whole else None
    lowest = None if run.lowest is None else f"{run.lowest:.1f}"
    ends = (*_outcome(run.at(BEFORE)), steps_of(run.rule), *_outcome(run.end))
    return (f"{run.task}, {run.seed}", RULES[run.rule].title, lowest, *ends, share, _until(run, TARGETS[run.task]))


def _until(run: Run, loss: float) -> str:
    first, flops = run.evaluations[0], run.flops_to(loss)
    if first["loss"] <= loss:
        return f"{loss}: < {first['flops'] / TERA:.1f}"
    return f"{loss}: " + ("-" if flops is None else f"{flops / TERA:.1f}")


def _outcome(evaluation: dict | None) -> tuple[str | None, str | None]:
    """Its loss, and the operations until then in TFLOP."""
    return (f"{evaluation['loss']:.4f}", f"{evaluation['flops'] / TERA:.1f}") if evaluation else (None, None)


def picture(groups: Sequence[Sequence[Run]]) -> Figure:
    """Held-out loss against operations, a panel a task and seed, those of a task on one scale, which ends where
    the highest began: dots where a run ends, past the fall of its rate."""
    figure = Figure(figsize=(5.2 * len(groups) + 0.6, 5.4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    shown: dict[str, Artist] = {}
    first: dict[str, Axes] = {}  # of each task
    for panel, group in zip(panels, groups, strict=True):
        for run in group:
            points = [(e["flops"] / TERA, e["loss"]) for e in run.evaluations]
            short = run.rule.removesuffix("_longer")
            style = {"color": COLORS[short], "linestyle": "-" if short == run.rule else "--"}
            (line,) = panel.plot(*zip(*points, strict=True), linewidth=1.2, **style)
            shown.setdefault(RULES[run.rule].title, line)
            if run.end:
                panel.plot(*points[-1], "o", color=COLORS[short], markersize=7)
        panel.set_title(f"{group[0].task}, seed {group[0].seed}", fontsize=10)
        panel.set_xlabel("TFLOP of training")
        panel.spines[["top", "right"]].set_visible(False)
        panel.sharey(first.setdefault(group[0].task, panel))
    for task, panel in first.items():  # what goes up beyond where it began would press all else together
        began = [run.evaluations[0]["loss"] for group in groups for run in group if run.task == task]
        panel.set_ylim(top=1.02 * max(began))
    panels[0].set_ylabel("held-out loss")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def write() -> None:
    """Writes the tables into docs/layers.md, and the picture beside it."""
    made = parts()
    update(DOCUMENT, made)
    picture(kept_groups()).savefig(PICTURE, dpi=DPI)
    print("\n\n".join(made.values()))
