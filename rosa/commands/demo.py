"""`rosa demo`: train a small model end to end."""

from __future__ import annotations

from pathlib import Path

from rosa.commands import parser
from rosa.storage.output import check_output


def run(argv: list[str]) -> None:
    """Run `rosa demo ...`."""
    options = parser("demo", "Train a small model end to end and report what it learnt.")
    options.add_argument("--output", default="demo_output", help="folder for the results; default: %(default)s")
    options.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options.add_argument(
        "--quick", action="store_true", help="a fifth of the training: it shows that all runs, its figures mean little"
    )
    args = options.parse_args(argv)

    check_output(Path(args.output))
    from rosa.demo import run as demo  # after the options are read: it takes seconds

    demo.run(Path(args.output), args.seed, demo.QUICK if args.quick else None)
