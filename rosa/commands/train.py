"""`rosa train`: fine-tune a model, and show how it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rosa.training.dry_run import dry_run
from rosa.training.finetune import finetune
from rosa.training.parsing import parse
from rosa.training.processes import leave_process_groups
from rosa.training.watching import PICTURE_NAME, summary


def run(argv: list[str]) -> None:
    """Run `rosa train ...`."""
    job, args = parse(argv)
    if job.dry_run:
        dry_run(job, args)
    else:
        trainer = finetune(job, args)
        if trainer.is_world_process_zero():
            _draw(trainer.state.log_history, Path(args.output_dir) / PICTURE_NAME)
            print(summary(trainer, job.load_in))
    leave_process_groups()


def _draw(history: list[dict[str, Any]], picture: Path) -> None:
    """Draws the run, if matplotlib is there: a run that has saved its adapter does not fail for its picture."""
    try:
        from rosa.inspection.run_figure import draw_run
    except ModuleNotFoundError as error:
        print(f"{picture} is not drawn: {error}")
        return
    if draw_run(history, picture):
        print(f"{picture} shows the run")
