"""Makes the tables and the picture of docs/layers.md from the runs of `benchmarks.smollm2.layer_choice`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
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
LAYERS = SMOLLM2.num_hidden_layers
TERA = 1e12
COLORS = ("#000000", "#9e9e9e", "#1d6a96", "#7fb7be", "#c8553d", "#e0a458", "#b08ea2", "#5b8c5a")


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

    def loss_at(self, flops: float) -> float | None:
        """The held-out loss after so many operations, on the line between two evaluations; None beyond them."""
        return _crossing([(e["flops"], e["loss"]) for e in self.evaluations], flops)

    def flops_to(self, loss: float) -> float | None:
        """The operations until the held-out loss is first so low, likewise; None where it never is."""
        before = None
        for after in self.evaluations:
            if after["loss"] <= loss:
                return before and _crossing(sorted((e["loss"], e["flops"]) for e in (before, after)), loss)
            before = after
        return None


def _crossing(points: Sequence[tuple[float, float]], x: float) -> float | None:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


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
    """What each rule came to: at its end, at equal operations, and in operations to equal loss."""
    body = [line for group in groups for line in _lines(group)]
    head = (
        "task, seed", "rule", "steps", "TFLOP a step", "lowest layer, mean", "loss at the end", "loss at equal TFLOP",
        "TFLOP to equal loss",
    )  # fmt: skip
    return markdown(head, body)


def _lines(group: Sequence[Run]) -> list[tuple]:
    """Of the runs that are as long as the longest, or longer by rule. Equal operations: those of the cheapest of them.
    Equal loss: the best that each of them has been at."""
    made = [run.last["step"] / RULES[run.rule].length for run in group]
    whole = [run for run, steps in zip(group, made, strict=True) if steps == max(made)]
    operations = min(run.last["flops"] for run in whole)
    loss = max(min(e["loss"] for e in run.evaluations) for run in whole)
    return [_line(run, operations, loss, compared=run in whole) for run in group]


def _line(run: Run, operations: float, loss: float, *, compared: bool) -> tuple:
    lowest = run.lowest
    at_equal, to_equal = (run.loss_at(operations), run.flops_to(loss)) if compared else (None, None)
    return (
        f"{run.task}, {run.seed}", RULES[run.rule].title, run.last["step"],
        f"{run.last['flops'] / run.last['step'] / TERA:.3f}",
        None if lowest is None else f"{lowest:.1f}",
        f"{run.last['loss']:.4f}",
        None if at_equal is None else f"{at_equal:.4f} at {operations / TERA:.1f}",
        None if to_equal is None else f"{to_equal / TERA:.1f} to {loss:.4f}",
    )  # fmt: skip


def draw(groups: Sequence[Sequence[Run]], path: Path) -> None:
    """Held-out loss against operations, a panel a task and seed."""
    figure = Figure(figsize=(5.2 * len(groups) + 0.6, 4.6), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    colors = dict(zip(RULES, COLORS, strict=False))
    for panel, group in zip(panels, groups, strict=True):
        for run in group:
            points = [(e["flops"] / TERA, e["loss"]) for e in run.evaluations]
            panel.plot(*zip(*points, strict=True), "o-", color=colors[run.rule], label=RULES[run.rule].title)
        panel.set_title(f"{group[0].task}, seed {group[0].seed}", fontsize=10)
        panel.set_xlabel("TFLOP of training")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("held-out loss")
    figure.savefig(path, dpi=DPI)


def write() -> None:
    """Writes the tables into docs/layers.md, and the picture beside it."""
    made = parts()
    update(DOCUMENT, made)
    draw(kept_groups(), PICTURE)
    print("\n\n".join(made.values()))
