"""What of a quantized base and RoSA fits a card of 24 GB: formulas, nothing measured.

    python -m benchmarks.quantized            writes the table into docs/quantized.md
    python -m benchmarks.quantized --print    prints it

As `benchmarks/paper.py`, with the weights of the decoder's linear layers in fewer bytes, and the inputs that
bitsandbytes' 8-bit layers keep until backward.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

if __name__ == "__main__":
    # The fused kernels, of which only the shapes are asked.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ROSA_BACKEND", "triton")

from benchmarks import paper
from benchmarks.document import update_or_print
from benchmarks.paper_counts import ALL, linears, sizes
from benchmarks.paper_printed import table
from rosa.training.memory import CONTEXT, GIB, LOADED, STATE, quantized

DOCUMENT = Path(__file__).parent.parent / "docs" / "quantized.md"
MODELS = ("Qwen2.5-7B", "Llama-3.1-8B", "Gemma-2-9B", "Qwen2.5-14B")
METHOD, LENGTH, LONGEST = "RoSA", 2048, paper.longest()  # tokens of a row at most, and of the longest that was found


def kept_inputs(name: str, load_in: str) -> int:
    """Bytes a token that a layer keeps beside what PyTorch saves: in 8 bits the inputs of the MLP's layers, and of the
    attention's last one where eager attention has not saved it."""
    config = ALL[name]
    width = config.hidden_size + config.intermediate_size
    if getattr(config, "attn_logit_softcapping", None):
        width += config.num_attention_heads * config.head_dim
    return 2 * width if load_in == "8bit" else 0


def state(name: str, load_in: str) -> float:
    """Bytes of the base, and of what trains."""
    found = sizes(name, METHOD)
    return quantized(found.frozen_bytes, linears(name), load_in) + STATE * found.trained_bytes


def activations(name: str, load_in: str, rows: int, length: int, *, checkpoints: bool) -> float:
    """Bytes that grow with the batch."""
    layers = 1 if checkpoints else ALL[name].num_hidden_layers
    kept = layers * rows * length * kept_inputs(name, load_in)
    return kept + paper.activations(name, METHOD, rows, length, checkpoints=checkpoints)


def most_rows(name: str, load_in: str, length: int, *, checkpoints: bool) -> int:
    """Rows of a length that a micro-batch can have on the card."""
    one, two = (activations(name, load_in, rows, length, checkpoints=checkpoints) for rows in (1, 2))
    room = paper.CARD - CONTEXT - state(name, load_in) - one
    return max(0, math.floor(room / (two - one)) + 1)


def quantized_table() -> str:
    rows = []
    for name in MODELS:
        for load_in in LOADED:
            base = quantized(sizes(name, METHOD).frozen_bytes, linears(name), load_in)
            rows.append([
                name, load_in, f"{base / GIB:.2f}", f"{(state(name, load_in) - base) / GIB:.2f}",
                *(
                    most_rows(name, load_in, length, checkpoints=checkpoints)
                    for length in (LENGTH, LONGEST)
                    for checkpoints in (False, True)
                ),
            ])  # fmt: skip
    head = ["model", "`--load_in`", "base", "trained"]
    head += [title for n in (LENGTH, LONGEST) for title in (f"rows of {n:,}", "with checkpoints")]
    return table(head, [[str(cell) for cell in row] for row in rows])


def tables() -> dict[str, str]:
    """The document's generated parts by name."""
    return {"quantized": quantized_table()}


if __name__ == "__main__":
    update_or_print("quantized", __doc__, DOCUMENT, tables)
