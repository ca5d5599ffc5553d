"""Makes the tables of speed and memory and their pictures from the rows in `benchmarks/results/`. Nothing is typed.

    python -m benchmarks.report            writes docs/benchmarks.md, README's table and pictures from the kept results
    python -m benchmarks.report FILES      the same from these files of results alone
    python -m benchmarks.report --print …  prints the tables instead, and writes nothing

Of every device and group the newest run counts. CPU times say nothing about a GPU and are in no table.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import charts, tables, targets
from benchmarks.document import fill
from benchmarks.results import RESULTS, Machine, ResultsError, Run, machines, read

ROOT = Path(__file__).parent.parent
DOCUMENTS = {"README.md": ("speed",), "docs/benchmarks.md": ("counted", "gpu")}  # and the parts that each has
NOT_MEASURED = (
    "**Speed and memory on a GPU: still to be measured.** On a machine with a GPU, `bash benchmarks/gpu.sh OUTDIR` "
    "runs the\ntests with the compiled kernels and the benchmarks; with its .json files copied to "
    "`benchmarks/results/<GPU>/`,\n`python -m benchmarks.report` puts the tables here."
)


def kept_results(folder: Path = RESULTS) -> list[Path]:
    """The files of results under a folder."""
    return sorted(folder.glob("*/*.json"))


def sections(runs: Sequence[Run]) -> dict[str, str]:
    """The documents' generated parts by name."""
    parts = {}
    if counted := _counted(runs):
        parts["speed"] = tables.counted(counted, tables.FIRST)
        parts["counted"] = f"{tables.counted(counted)}\n\n![Launches and bytes kept](benchmark_counted.png)"
    parts["gpu"] = "\n\n".join(_machine(machine) for machine in machines(runs)) or NOT_MEASURED
    return parts


def _machine(machine: Machine) -> str:
    """The tables of one GPU: targets, times, training step, decoding, errors."""
    parts = [f"#### {machine.device}", targets.table(machine)]
    for group in timed_groups(machine):
        parts += [tables.timed(machine, group), f"![{group}]({chart_name(machine, group)})"]
    if machine.rows("launch_shape"):
        parts.append(tables.launch_shapes(machine))
    if machine.rows("training_step"):
        parts += [tables.training(machine), f"![training step]({chart_name(machine, 'training_step')})"]
    if machine.rows("decode"):
        parts.append(tables.decode(machine))
    return "\n\n".join([*parts, *tables.accuracy(machine)])


def draw(runs: Sequence[Run], docs: Path) -> None:
    """Draws the pictures into the folder `docs`."""
    if counted := _counted(runs):
        charts.counted(counted, docs / "benchmark_counted.png")
    for machine in machines(runs):
        for group in timed_groups(machine):
            charts.timed(machine, group, docs / chart_name(machine, group))
        if machine.rows("training_step"):
            charts.training(machine, docs / chart_name(machine, "training_step"))


def timed_groups(machine: Machine) -> list[str]:
    """The ops and layers that were timed on the machine."""
    return [group for group in tables.TITLES if machine.rows(group, mode="both")]


def chart_name(machine: Machine, group: str) -> str:
    """File name of the picture of a group."""
    return f"benchmark_{re.sub(r'[^a-z0-9]+', '_', machine.device.lower())}_{group}.png"


def _counted(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if any(row["group"] == "counted" for row in run.rows)), None)


def filled(parts: dict[str, str], root: Path = ROOT) -> dict[Path, str]:
    """The text of each of DOCUMENTS under `root`, with these parts in it.

    Raises:
        ResultsError: a document has no place for a part.
    """
    texts = {}
    for document, names in DOCUMENTS.items():
        file = root / document
        own = {name: parts[name] for name in names if name in parts}
        texts[file] = fill(file.read_text(encoding="utf-8"), own)
    return texts


def write_report(runs: Sequence[Run], root: Path = ROOT) -> dict[str, str]:
    """Writes DOCUMENTS under `root`, and the pictures into `root`/docs; returns the parts by name.

    Raises:
        ResultsError: a document has no place for a part. Nothing was written.
    """
    parts = sections(runs)
    texts = filled(parts, root)
    draw(runs, root / "docs")
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="files of results (default: all that are kept)"
    )
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the tables and write nothing")
    options = parser.parse_args(arguments)
    try:
        files = options.files or kept_results()
        runs = [read(path) for path in files]
        parts = sections(runs) if options.only_print else write_report(runs)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(parts.values()))
    for run in runs:
        if run.environment["device"].startswith("cpu") and run is not _counted(runs):
            print(f"{run.path}: of a CPU; it says nothing of a GPU's times and is in no table of them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
