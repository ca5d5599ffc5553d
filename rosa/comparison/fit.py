"""Whether the options are right and every method fits every model, found out before any training."""

from __future__ import annotations

from argparse import ArgumentError

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rosa.adapters.pretrained import quantization_of
from rosa.comparison.plan import Cell
from rosa.training.methods import attach, trainable
from rosa.training.parsing import parse


def check_options(cell: Cell) -> None:
    """Read the options of a cell, whose model and data need not be there yet.

    Raises:
        ValueError: an option is wrong.
    """
    try:
        job, _ = parse(cell.arguments)
        _ = job.config, job.peft_settings
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"method {cell.method}: {error}") from error


def check_fit(cell: Cell) -> tuple[int, int]:
    """Build the cell's model on the meta device, from its configuration alone, and attach its method.

    Args:
        cell (Cell): its model's folder or name must be within reach.

    Returns:
        tuple of int: how many parameters train, and how many there are in all.

    Raises:
        ValueError: an option is wrong, or the method does not fit the model.
        OSError: the model is not there.
        ImportError: it is to be quantized, and no package that does is there.
    """
    check_options(cell)
    job, _ = parse(cell.arguments)
    if job.load_in is not None:
        quantization_of(job.model, job.load_in)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    try:
        return trainable(attach(model, job.method, config=job.config, settings=job.peft_settings))
    except (ValueError, TypeError) as error:
        raise ValueError(f"method {cell.method}: {error}") from error
