"""`rosa train`: fine-tune a model."""

from __future__ import annotations

from rosa.finetune import finetune
from rosa.finetune_arguments import parse
from rosa.parallel import leave_process_groups


def run(argv: list[str]) -> None:
    """Run `rosa train ...`."""
    finetune(*parse(argv))
    leave_process_groups()
