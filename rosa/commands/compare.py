"""`rosa compare`: methods x seeds on the same data, in one table."""

from __future__ import annotations

from pathlib import Path

from rosa.commands import parser


def run(argv: list[str]) -> None:
    """Run `rosa compare ...`."""
    options = parser("compare", "Train and test several methods with several seeds, and make one table of them.")
    options.add_argument("--config", type=Path, required=True, help="YAML file of the comparison")
    options.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD",
        help="run these of the file's methods; default: all",
    )
    options.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="other values than the file's, such as train.max_steps=4 'seeds=[1]' decoding.limit=10",
    )
    options.add_argument("--jobs", type=int, default=1, help="cells at a time, each in a process; default: %(default)s")
    args = options.parse_args(argv)

    # After the options are read: these take seconds.
    from rosa.comparison.narrowing import parse_changes
    from rosa.comparison.plan import load_comparison
    from rosa.comparison.report import write_report
    from rosa.comparison.run import run as run_comparison

    comparison, outcomes = run_comparison(load_comparison(args.config, parse_changes(args.set), args.only), args.jobs)
    for file in write_report(comparison, outcomes):
        if file.suffix == ".md":
            print(file.read_text(encoding="utf-8"))
        print(f"written: {file}")
