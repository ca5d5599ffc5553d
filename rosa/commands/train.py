"""`rosa train`: fine-tune a model."""

from __future__ import annotations

from rosa.training.finetune import finetune
from rosa.training.finetune_arguments import parse
from rosa.training.processes import leave_process_groups


def run(argv: list[str]) -> None:
    """Run `rosa train ...`."""
    finetune(*parse(argv))
    leave_process_groups()
