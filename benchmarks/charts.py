"""The report's pictures: bars of the same rows that the tables are made of."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.liger import LIGER
from benchmarks.results import Machine, Run
from benchmarks.tables import GIGA, HEADINGS, OP_PROVIDERS, TITLES, about

COLORS = dict(
    zip(OP_PROVIDERS, ("#9e9e9e", "#616161", "#b08ea2", "#e0a458", "#c8553d", "#7fb7be", "#1d6a96"), strict=True)
)
OURS, OTHERS = COLORS["fused"], COLORS["huggingface"]
DPI = 110


def counted(run: Run, path: Path) -> None:
    """Launches of a decoder layer and bytes kept for backward, by method."""
    rows = [row for row in run.rows if row["group"] == "counted"]
    names = [row["provider"] for row in rows]
    colors = [OURS if _is_ours(name) else OTHERS for name in names]
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.3), layout="constrained")
    launches, saved = figure.subplots(1, 2, sharey=True)
    _bars(launches, names, [row["forward"] + row["backward"] for row in rows], colors, "{:,.0f}")
    launches.set_title("launches forward and backward")
    _bars(saved, names, [row["saved_per_token"] / 1e3 for row in rows], colors, "{:,.0f}")
    saved.set_title("kB kept for backward a token")
    figure.suptitle("A decoder layer of Qwen2.5-7B shape, counted", fontsize=11)
    figure.savefig(path, dpi=DPI)


def timed(machine: Machine, group: str, path: Path) -> None:
    """An op or a layer, forward and backward: a panel a model, bars by provider for every number of tokens."""
    measured = machine.rows(group, mode="both")
    shapes = list(dict.fromkeys(row["shape"] for row in measured))
    figure = Figure(figsize=(4.2 * len(shapes) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    providers = [p for p in OP_PROVIDERS if any(row["provider"] == p for row in measured)]
    for panel, shape in zip(panels, shapes, strict=True):
        tokens = list(dict.fromkeys((row["batch"], row["seq"]) for row in measured if row["shape"] == shape))
        for number, provider in enumerate(providers):
            found = [
                machine.find(group, mode="both", provider=provider, shape=shape, batch=batch, seq=seq)
                for batch, seq in tokens
            ]
            places = [x + (number - (len(providers) - 1) / 2) * 0.8 / len(providers) for x in range(len(tokens))]
            heights = [row["milliseconds"] if row else float("nan") for row in found]
            panel.bar(places, heights, 0.8 / len(providers), color=COLORS[provider], label=HEADINGS[provider])
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(range(len(tokens)), [f"{batch} x {seq:,}" for batch, seq in tokens])
        panel.set_title(shape, fontsize=10)
        panel.set_xlabel("tokens")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms, forward and backward")
    handles, labels = panels[0].get_legend_handles_labels()
    labels = [label.replace("`", "") for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{TITLES[group].replace('`', '')}\n{about(machine.runs[group])}", fontsize=9)
    figure.savefig(path, dpi=DPI)


def training(machine: Machine, path: Path) -> None:
    """Time and memory of the training step of most tokens, by method; the line is the frozen floor."""
    rows = machine.rows("training_step")
    most = max(rows, key=lambda row: row["batch"] * row["seq"])
    rows = [row for row in rows if all(row[label] == most[label] for label in ("shape", "batch", "seq"))]
    names = [row["provider"] for row in rows]
    colors = [OURS if name.removesuffix(LIGER) in ("RoSA skip", "RoSA mask", "RoAd") else OTHERS for name in names]
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.6), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    _bars(time, names, [row["milliseconds"] for row in rows], colors, "{:,.0f}")
    time.set_title("ms a step")
    if "frozen floor" in names:
        time.axvline(rows[names.index("frozen floor")]["milliseconds"], color="black", linewidth=0.8, linestyle=":")
    _bars(memory, names, [(row["peak_bytes"] or float("nan")) / GIGA for row in rows], colors, "{:.1f}")
    memory.set_title("peak memory, GB")
    title = f"Training step of {most['shape']}, {most['batch']} x {most['seq']:,} tokens"
    figure.suptitle(f"{title}\n{about(machine.runs['training_step'])}", fontsize=9)
    figure.savefig(path, dpi=DPI)


def _bars(axes: Axes, names: list[str], values: list[float], colors: list[str], form: str) -> None:
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
    axes.margins(x=0.14)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _is_ours(layer: str) -> bool:
    return layer.startswith(("RoSA", "RoAd")) and "naive" not in layer and "(peft)" not in layer
