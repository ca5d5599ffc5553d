"""The report's tables in Markdown, made from rows; every one says which machine, versions and date it is from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import ERRORS, PACKAGES, Machine, Row, Run

OP_PROVIDERS = ("huggingface", "liger", "peft", "eager", "compiled", "separate", "fused")
HEADINGS = {
    "huggingface": "plain RoPE, Hugging Face",
    "liger": "plain RoPE, Liger",
    "peft": "peft",
    "eager": "eager",
    "compiled": "compiled",
    "separate": "GEMMs and `rope_roae`",
    "fused": "fused",
}
TITLES = {
    "rope_roae": "Op `rope_roae`",
    "roae": "Op `roae`, the whole of RoAE from H",
    "road": "Op `road`",
    "attention": "Attention block",
    "decoder_layer": "Decoder layer",
}
# Of the counted layers, those that a reader asks for first.
FIRST = (
    "frozen (no adapter)", "RoSA", "RoSA, frozen by DLS", "RoAd_2, all linears", "LoRA r=16, all linears (peft)",
    "DoRA r=16, all linears (peft)", "RoAd_2, all linears (peft)",
)  # fmt: skip
GIGA = 1e9


def counted(run: Run, layers: Sequence[str] | None = None) -> str:
    """Launches of a decoder layer and bytes kept for backward, by `python -m benchmarks.static`; of these or of all."""
    rows = [
        (
            r["provider"],
            r["forward"],
            r["backward"],
            r["decode"],
            f"{r['saved_per_token']:,}",
            f"{r['saved_besides']:,}",
        )
        for r in run.rows
        if r["group"] == "counted" and (layers is None or r["provider"] in layers)
    ]
    kept = ("bytes kept for backward a token", "beside the tokens")
    header = ("layer", "launches forward", "backward", "a decoded token", *kept)
    return f"{markdown(header, rows)}\n\nCounted on a CPU, not timed: {_versions(run)}."


def timed(machine: Machine, group: str) -> str:
    """Forward and backward of an op or a layer, in milliseconds, providers side by side."""
    measured = machine.rows(group, mode="both")
    providers = [p for p in OP_PROVIDERS if any(row["provider"] == p for row in measured)]
    rate = machine.rate(group, "bytes")
    with_share = rate is not None and any("bytes" in row for row in measured)
    rows = []
    for case in _unique((row["shape"], row["batch"], row["seq"]) for row in measured):
        labels = dict(zip(("shape", "batch", "seq"), case, strict=True))
        found = {p: machine.find(group, mode="both", provider=p, **labels) for p in providers}
        times = [row and f"{row['milliseconds']:.3g}" for row in found.values()]
        share = [bandwidth_share(found.get("fused"), rate)] if with_share else []
        rows.append((case[0], f"{case[1]} x {case[2]:,}", *times, *(s and f"{s:.0%}" for s in share)))
    header = ["model", "tokens", *(HEADINGS[p] for p in providers), *(["fused, of a copy's bandwidth"] * with_share)]
    caption = f"Milliseconds forward and backward, medians, bfloat16: {about(machine.runs[group])}."
    return f"**{TITLES[group]}**\n\n{markdown(header, rows)}\n\n{caption}"


def launch_shapes(machine: Machine) -> str:
    """Times of `roae` by one constant of its launches, and of separate products."""
    measured = machine.rows("launch_shape")
    cases = _unique((row["shape"], row["batch"], row["seq"], row["mode"]) for row in measured)
    rows = []
    for (provider,) in _unique((row["provider"],) for row in measured):
        labels = [dict(zip(("shape", "batch", "seq", "mode"), case, strict=True)) for case in cases]
        found = [machine.find("launch_shape", provider=provider, **case) for case in labels]
        rows.append((HEADINGS.get(provider, provider), *(row and f"{row['milliseconds']:.3g}" for row in found)))
    header = ("constant", *(f"{shape}, {batch} x {seq:,}, {mode}" for shape, batch, seq, mode in cases))
    caption = f"Milliseconds, medians, bfloat16: {about(machine.runs['launch_shape'])}."
    return f"**Op `roae`, one constant of its launches changed at a time**\n\n{markdown(header, rows)}\n\n{caption}"


def training(machine: Machine) -> str:
    """The training step: time, memory and trainable parameters of every method."""
    run = machine.runs["training_step"]
    measured = machine.rows("training_step")
    sections = []
    for shape, batch, seq in _unique((row["shape"], row["batch"], row["seq"]) for row in measured):
        labels = {"shape": shape, "batch": batch, "seq": seq}
        floor = machine.find("training_step", provider="frozen floor", **labels)
        rows = [_training_row(row, floor) for row in machine.rows("training_step", **labels)]
        header = ("method", "ms a step", "of the frozen floor", "tokens/s", "peak memory, GB", "trainable parameters")
        title = f"**Training step of {shape}, {batch} x {seq:,} tokens, random weights, bfloat16**"
        sections.append(f"{title}\n\n{markdown(header, rows)}\n\nMeans over whole DLS intervals: {about(run)}.")
    return "\n\n".join(sections)


def _training_row(row: Row, floor: Row | None) -> tuple:
    return (
        row["provider"],
        f"{row['milliseconds']:.4g}",
        floor and f"{row['milliseconds'] / floor['milliseconds']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        row["peak_bytes"] and f"{row['peak_bytes'] / GIGA:.1f}",
        f"{row['trainable_parameters']:,}",
    )


def decode(machine: Machine) -> str:
    """Decoding one token at a time: the time of a token by method, for every model and batch."""
    measured = machine.rows("decode")
    methods = [method for (method,) in _unique((row["provider"],) for row in measured)]
    rows = []
    for shape, batch, seq in _unique((row["shape"], row["batch"], row["seq"]) for row in measured):
        found = [machine.find("decode", provider=m, shape=shape, batch=batch, seq=seq) for m in methods]
        rows.append((shape, batch, seq, *(row and f"{row['milliseconds']:.3g}" for row in found)))
    caption = f"Milliseconds a token, means, random weights, bfloat16, unmerged: {about(machine.runs['decode'])}."
    return f"**Decoding with a cache**\n\n{markdown(('model', 'batch', 'prompt', *methods), rows)}\n\n{caption}"


def accuracy(machine: Machine) -> list[str]:
    """Errors of the ops against float64, the worst over all shapes; a table an op."""
    sections = []
    for group in ("rope_roae", "roae"):
        measured = machine.rows(group, mode="accuracy")
        rows = []
        for provider in (p for p in OP_PROVIDERS if any(row["provider"] == p for row in measured)):
            of_provider = [row for row in measured if row["provider"] == provider]
            rows.append((HEADINGS[provider], *(f"{max(row[e] for row in of_provider):.2e}" for e in ERRORS)))
        if rows:
            header = ("", "outputs, largest", "outputs, relative L2", "gradients, largest", "gradients, relative L2")
            caption = f"In bfloat16, the worst of all shapes: {about(machine.runs[group])}."
            sections.append(f"**{TITLES[group]}: error against float64**\n\n{markdown(header, rows)}\n\n{caption}")
    return sections


def bandwidth_share(row: Row | None, rate: float | None) -> float | None:
    """Bytes that a row's op must move, as a share of what a copy would have moved in its time."""
    if row is None or rate is None or "bytes" not in row:
        return None
    return row["bytes"] / row["milliseconds"] * 1e3 / rate


def about(run: Run) -> str:
    """The machine, date and versions of a run, in a line."""
    e = run.environment
    driver = f", driver {e['driver']}" if e.get("driver") else ""
    return f"{e['device']}{driver}, {_versions(run)}"


def _versions(run: Run) -> str:
    e = run.environment
    packages = [f"{name.replace('_', '-')} {e[name]}" for name in PACKAGES if e.get(name)]
    return f"{e.get('date') or 'no date'}, commit {e.get('commit') or 'not recorded'}, {', '.join(packages)}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None becomes an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines)


def _unique(items: Iterable[tuple]) -> list[tuple]:
    return list(dict.fromkeys(items))
