"""What the paper's methods train, and what of them fits a card of 24 GB: counts and formulas, nothing measured but the
trial of `benchmarks.paper_trial`.

    python -m benchmarks.paper            writes the tables into docs/paper.md
    python -m benchmarks.paper --print    prints them

What a decoder layer saves for backward is counted on tensors that have shapes and no values, by
running the layer as `--bf16 true` runs it.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from statistics import fmean

if __name__ == "__main__":
    # The fused kernels, of which only the shapes are asked.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ROSA_BACKEND", "triton")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import padding, scaling, static
from benchmarks.document import update_or_print
from benchmarks.paper_counts import ALL, MODELS, build, linears, methods, sizes
from benchmarks.paper_printed import averages_table, newer_table, parameters_table, table
from benchmarks.paper_trial import trial_table
from rosa.models.decoder import decoder_layers
from rosa.training.memory import CONTEXT, GIB, LOADED, STATE, kept_by_layers, logits, quantized, state_bytes

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "paper.md"
CARD = 24 * 2**30  # bytes of an RTX 3090 or 4090
ROWS, LENGTH = 2, 2048  # the paper's micro-batch at its longest
IN_MEMORY = ("RoSA", "LoRA", "DoRA")
LEARNT = 0.5  # of the tokens, about the share of math_data's that are of the response
RANKS = 8  # for which ZeRO-1's saving is shown


@functools.cache
def saved(name: str, method: str, rows: int, length: int, *, frozen: bool = False) -> int:
    """Bytes that a decoder layer saves for backward, without gradient checkpointing and without padding.

    Args:
        name (str): one of ALL.
        method (str): one of `methods()`.
        rows, length (int): of the batch; length in tokens.
        frozen (bool): layer selection has frozen the layer.
    """
    config = ALL[name]
    layer = decoder_layers(build(name, methods()[method], layers=1).train())[0].module
    if frozen:
        layer.requires_grad_(False)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        layer.to_empty(device="cpu")
        hidden_states = torch.empty(rows, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = torch.empty(2, 1, length, width, dtype=torch.bfloat16).unbind()
        return static.forward(layer, hidden_states, (cos.clone(), sin.clone()))[1]


def state(name: str, method: str) -> int:
    """Bytes of a model's frozen weights, and of what trains: weights, gradients and AdamW's moments."""
    found = sizes(name, method)
    return state_bytes(found.frozen_bytes, found.trained_bytes)


def activations(
    name: str, method: str, rows: int, length: int, *, checkpoints: bool, frozen: float = 0.0, learnt: float = 1.0
) -> float:
    """Bytes that grow with the batch: what all layers save (with gradient checkpointing their inputs, and what the one
    saves that is computed again), the logits, and what the loss makes of them.

    Args:
        frozen (float): share of the layers that layer selection has frozen; 0 in the step that selects.
        learnt (float): share of the tokens that have logits.
    """
    config = ALL[name]
    layer = saved(name, method, rows, length)
    if frozen and not checkpoints:
        layer = (1 - frozen) * layer + frozen * saved(name, method, rows, length, frozen=True)
    kept = kept_by_layers(config, layer, rows * length, checkpoints=checkpoints)
    return kept + learnt * rows * length * logits(config)


def needed(name: str, method: str, rows: int, length: int, *, checkpoints: bool = False, learnt: float = 1.0) -> float:
    """Bytes of a training step, in the step that needs most."""
    return state(name, method) + activations(name, method, rows, length, checkpoints=checkpoints, learnt=learnt)


def most_tokens(name: str, method: str, *, checkpoints: bool) -> int:
    """Tokens, in rows of LENGTH, that a micro-batch can have on the card; 0 if the model alone does not fit.

    A part of a row counts as such a part of a long row's bytes, which is more than a short row needs.
    """
    one, two = (activations(name, method, rows, LENGTH, checkpoints=checkpoints) for rows in (1, 2))
    room = CARD - CONTEXT - state(name, method) - (2 * one - two)
    return max(0, math.floor(room * LENGTH / (two - one)))


def longest() -> int:
    """Tokens of the longest row of the papers' data that was at hand."""
    return max(max(lengths) for lengths in padding.read_kept().values())


def memory_table() -> str:
    real = longest()
    rows = []
    for name in MODELS:
        for method in IN_MEMORY:
            found, a_token = sizes(name, method), saved(name, method, ROWS, LENGTH) / (ROWS * LENGTH)
            rows.append([
                name, method, f"{found.frozen_bytes / GIB:.2f}", f"{STATE * found.trained_bytes / GIB:.2f}",
                f"{MODELS[name].num_hidden_layers * a_token / 2**20:.2f}",
                *(f"{most_tokens(name, method, checkpoints=c):,}" for c in (False, True)),
                *(_fits(needed(name, method, ROWS, n, checkpoints=c)) for n in (LENGTH, real) for c in (False, True)),
            ])  # fmt: skip
    head = ["model", "method", "base", "trained", "MiB a token", "most tokens", "with checkpoints"]
    head += [title for n in (LENGTH, real) for title in (f"{ROWS} x {n:,}", "with checkpoints")]
    return table(head, rows)


def learnt_table() -> str:
    """The longest micro-batch with logits where a token is learnt, as `rosa train` has it, and half of them learnt."""
    cases = [(method, checkpoints) for method in IN_MEMORY for checkpoints in (False, True)]
    rows = [
        [name, *(_fits(needed(name, m, ROWS, LENGTH, checkpoints=c, learnt=LEARNT)) for m, c in cases)]
        for name in MODELS
    ]
    return table(["model", *(f"{m}{', with checkpoints' if c else ''}" for m, c in cases)], rows)


def lengths_table() -> str:
    rows = []
    for name, lengths in padding.read_kept().items():
        most = sorted(lengths)[int(0.99 * len(lengths))]
        rows.append([name, f"{len(lengths):,}", f"{fmean(lengths):.0f}", f"{most}", f"{max(lengths)}"])
    return table(["rows of", "number", "tokens, mean", "99 of 100 at most", "longest"], rows)


def savings_table() -> str:
    """What quantizing the linear layers of the decoder leaves of the base, and what else is saved."""
    rows = []
    for name in MODELS:
        plain = sizes(name, "LoRA").frozen_bytes
        bases = [plain, *(quantized(plain, linears(name), load_in) for load_in in LOADED)]
        selecting, between = (
            activations(name, "RoSA", ROWS, LENGTH, checkpoints=False, frozen=k) for k in (0.0, 1 - scaling.K_RATIO)
        )
        moments = [2 * sizes(name, method).trained_bytes * (RANKS - 1) / RANKS for method in ("RoSA", "LoRA")]
        saving = [selecting - between, *moments]
        rows.append([name, *(f"{size / GIB:.2f}" for size in bases + saving)])
    head = [
        "model",
        "base in bfloat16",
        *(f"in {load_in}" for load_in in LOADED),
        "RoSA between selections saves",
    ]
    head += [f"ZeRO-1 on {RANKS} GPUs saves: RoSA", "LoRA"]
    return table(head, rows)


def _fits(size: float) -> str:
    return f"{size / GIB:.1f} {'✓' if size <= CARD - CONTEXT else '✗'}"


def tables() -> dict[str, str]:
    """The document's generated parts by name."""
    return {
        "trial": trial_table(),
        "parameters": parameters_table(),
        "newer": newer_table(),
        "averages": averages_table(),
        "memory": memory_table(),
        "learnt": learnt_table(),
        "lengths": lengths_table(),
        "savings": savings_table(),
    }


if __name__ == "__main__":
    update_or_print("paper", __doc__, DOCUMENT, tables)
