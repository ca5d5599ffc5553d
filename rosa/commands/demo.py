"""`rosa demo`: train a small model end to end."""

from __future__ import annotations

from pathlib import Path

from rosa.commands import parser
from rosa.demo import run as demo


def run(argv: list[str]) -> None:
    """Run `rosa demo ...`."""
    options = parser("demo", "Train a small model end to end and report what it learnt.")
    options.add_argument("--output", default="demo_output", help="folder for the results; default: %(default)s")
    options.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = options.parse_args(argv)
    demo.run(Path(args.output), args.seed)
