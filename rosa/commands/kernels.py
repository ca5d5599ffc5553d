"""`rosa kernels`: compile the kernels for GPUs that need not be there."""

from __future__ import annotations

from rosa.commands import parser
from rosa_kernels.cards import CARDS
from rosa_kernels.offline import main


def run(argv: list[str]) -> None:
    """Run `rosa kernels ...`."""
    options = parser(
        "kernels",
        "Compile the kernels for GPUs that need not be there, and show registers, traffic and what bounds them.",
    )
    options.add_argument(
        "--arch", nargs="+", action="extend", help="default: sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 gfx942"
    )
    args = options.parse_args(argv)
    main(args.arch or list(CARDS))
