"""What logits of the response alone save of a training step: arithmetic, and the largest tensors. Counted, not timed.

A micro-batch of two rows as long as the mean of real ones, prompt and response. RoSA trains, in bfloat16, without layer
selection; tensors have shapes and no values. `python -m benchmarks.response_logits` prints the table, and with `--save`
keeps its rows.
"""

from __future__ import annotations

import argparse
import math
import os
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("ROSA_BACKEND", "reference")  # whose operations are counted

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

import rosa
from benchmarks.presets import NAMES, PRESETS
from benchmarks.results import RESPONSE_LOGITS, Row, environment, write
from rosa.data.tokens import IGNORED_LABEL
from rosa.training.response_logits import ResponseLogits

CHARACTERS_A_TOKEN = 4
ROWS = 2
SHAPES = ("0.5b", "7b")


class Lengths(NamedTuple):
    """Mean characters of the rows of a data set."""

    rows: int
    prompt: int
    response: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Of prompt and response, estimated; with the one that ends the sequence."""
        return math.ceil(self.prompt / CHARACTERS_A_TOKEN), math.ceil(self.response / CHARACTERS_A_TOKEN) + 1


# Of LLM-Adapters' files (Hu et al. 2023): the rows of boolq, ARC-Challenge, ARC-Easy and openbookqa together, four of
# the eight sets that Commonsense15K is drawn from; and math_data.json, which has the form of Math10K.
LENGTHS = {"Commonsense15K": Lengths(17754, 353, 28), "Math10K": Lengths(3260, 329, 215)}


class Cost(NamedTuple):
    """Of one step: arithmetic, and the bytes of logits, and of what the loss makes of them, that live at a time."""

    flops: int
    logits_bytes: int


class Live(TorchDispatchMode):
    """The most bytes that live at a time in tensors as wide as the vocabulary, the model's own aside."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.most, self._words = 0, model.config.vocab_size
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._held: Counter[int] = Counter()  # tensors of each storage
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self._words:
                self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._own:  # a view of the output layer's weight
            return
        self._held[key] += 1
        self._bytes[key] = storage.nbytes()
        weakref.finalize(tensor, self._drop, key)
        self.most = max(self.most, sum(self._bytes.values()))

    def _drop(self, key: int) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            del self._bytes[key]


def cost(preset: str, lengths: Lengths, *, alone: bool) -> Cost:
    """One step of a model of PRESETS on ROWS rows.

    Args:
        preset (str): which.
        lengths (Lengths): of the rows.
        alone (bool): with the logits of the response alone.
    """
    config = PRESETS[preset]
    # All layers are alike: the second is taken for all that follow.
    short = (type(config)(**config.to_dict() | {"num_hidden_layers": n, "layer_types": None}) for n in (1, 2))
    one, two = (_cost(part, lengths, alone) for part in short)
    return Cost(one.flops + (config.num_hidden_layers - 1) * (two.flops - one.flops), one.logits_bytes)


def _cost(config: Qwen2Config, lengths: Lengths, alone: bool) -> Cost:
    with torch.device("meta"):
        model = rosa.patch(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)).train()
    prompt, response = lengths.tokens
    labels = torch.zeros(ROWS, prompt + response, dtype=torch.long)
    labels[:, :prompt] = IGNORED_LABEL
    logits = ResponseLogits(model)
    gathered = logits.gathering({"labels": labels}) if alone else nullcontext({"labels": labels})
    # Where the labels stand is read off them; all that follows has no values.
    with gathered as batch, FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        ids = torch.zeros(labels.shape, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, Live(model) as live:
            model(input_ids=ids, labels=batch["labels"]).loss.backward()
    logits.remove()
    return Cost(counter.get_total_flops(), live.most)


def rows() -> list[Row]:
    """The table, measured as it runs."""
    made = []
    for preset in SHAPES:
        for data, lengths in LENGTHS.items():
            labels = dict(
                group="response_logits", mode="both", shape=NAMES[preset], batch=ROWS, seq=sum(lengths.tokens)
            )
            for provider, alone in (("all", False), ("response", True)):
                found = cost(preset, lengths, alone=alone)._asdict()
                made.append({**labels, "provider": f"{provider}, {data}", **found, "labelled": lengths.tokens[1]})
    return made


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.response_logits", description=__doc__)
    parser.add_argument("--save", action="store_true", help=f"keep the rows in {RESPONSE_LOGITS}")
    save = parser.parse_args().save
    made = rows()
    print(f"{'model':14} {'logits of':26} {'tokens':>8} {'labelled':>8} {'GFLOP':>10} {'MiB of logits':>14}")
    for row in made:
        print(
            f"{row['shape']:14} {row['provider']:26} {row['batch']} x {row['seq']:4} {row['labelled']:8} "
            f"{row['flops'] / 1e9:10,.1f} {row['logits_bytes'] / 2**20:14,.1f}"
        )
    if save:
        write(RESPONSE_LOGITS, environment(), made)


if __name__ == "__main__":
    main()
