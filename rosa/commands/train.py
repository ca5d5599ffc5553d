"""`rosa train`: fine-tune a model."""

from __future__ import annotations

from rosa.training.dry_run import dry_run
from rosa.training.finetune import finetune
from rosa.training.finetune_arguments import parse
from rosa.training.processes import leave_process_groups


def run(argv: list[str]) -> None:
    """Run `rosa train ...`."""
    job, args = parse(argv)
    if job.dry_run:
        dry_run(job, args)
    else:
        finetune(job, args)
    leave_process_groups()
