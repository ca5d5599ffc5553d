"""The arithmetic problems that a run of the study held out, and a model's losses on them, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa.adapters.pretrained import load_tokenizer
from rosa.data.rows import load_rows
from rosa.data.tokens import IGNORED_LABEL, tokenize
from rosa.storage.settings import load_settings
from rosa.training.job_data import split

ROOT = Path(__file__).parents[2]


class Problem(NamedTuple):
    """A held-out problem as training has it: tokens of prompt and response, labels of the response alone."""

    ids: list[int]
    labels: list[int]


def held_out(model: str, seed: int) -> list[Problem]:
    """The problems that the study's runs with a seed have not learnt."""
    settings = load_settings(ROOT / "configs" / "smollm2" / "train_arithmetic.yaml")
    _, rows = split(load_rows(settings["data"]), settings["val_size"], seed)
    examples = tokenize(rows, load_tokenizer(model), max_length=settings["max_length"])
    return [Problem(example["input_ids"], example["labels"]) for example in examples]


@torch.inference_mode()
def response_logits(model: nn.Module, row: Sequence[Problem], start: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of the response tokens of a row, `[tokens, vocabulary]`, and these tokens, `[tokens]`.

    Args:
        model (nn.Module): a causal language model of transformers or peft.
        row (sequence of Problem): one behind another, each sees those before it.
        start (int): the position of the first token.
    """
    ids = torch.tensor([[token for problem in row for token in problem.ids]])
    labels = torch.tensor([label for problem in row for label in problem.labels])
    at = (labels != IGNORED_LABEL).nonzero().flatten()
    positions = torch.arange(start, start + ids.shape[1]).unsqueeze(0)
    logits = model(input_ids=ids, position_ids=positions, logits_to_keep=at - 1, use_cache=False).logits
    return logits[0], labels[at]


def losses(model: nn.Module, row: Sequence[Problem], start: int = 0) -> list[float]:
    """The mean loss of each problem of a row on its response."""
    found = F.cross_entropy(*response_logits(model, row, start), reduction="none")
    sizes = [sum(label != IGNORED_LABEL for label in problem.labels) for problem in row]
    return [part.mean().item() for part in found.split(sizes)]
