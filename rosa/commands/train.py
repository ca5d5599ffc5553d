"""`rosa train`: fine-tune a model."""

from __future__ import annotations

from rosa.finetune import finetune
from rosa.finetune_arguments import parse


def run(argv: list[str]) -> None:
    """Run `rosa train ...`."""
    finetune(*parse(argv))
