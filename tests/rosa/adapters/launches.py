"""Compiles for a GPU that is not there what models in 16 bits launch: the interpreter, in which the kernels are tested
without a GPU, knows no types, and runs what does not compile.

`python -m tests.rosa.adapters.launches` prints each launch that does not compile, and last how many were compiled. The
models are tiny and compute on the CPU; what is launched is looked at, and its outputs are zeros.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch

import rosa
from rosa_kernels import dispatch, launch, road_dispatch, road_triton
from rosa_kernels.offline import compile_launch, specialize
from tests.rosa.families import make_model

ROSA, ROAD = rosa.RosaConfig(rank=4, r_low=0.5), rosa.RoadConfig(variant=2)
CONFIGS = {
    "llama": (  # grouped queries
        ROSA,
        rosa.RosaConfig(rank=4, r_low=0.5, adapter_dtype="bfloat16"),
        *(rosa.RoadConfig(variant=variant) for variant in (1, 2, 4)),
        rosa.RoadConfig(targets=("q_proj", "v_proj")),
        rosa.RoadConfig(variant=1, targets=("k_proj",), adapter_dtype="bfloat16"),
    ),
    "cohere": (ROSA, ROAD),  # interleaved pairs
    "phi": (ROSA, ROAD),  # as many key heads, and of them a part is turned
}
IDS = torch.arange(3, 21).view(2, 9)
SEEN: dict[tuple, tuple] = {}  # of each specialization, where it was launched first, and the launch


def look(place: str):
    """In `run_launch`'s place."""

    def run(of, *arguments):
        made = of(*arguments)
        SEEN.setdefault((made.kernel.fn.__name__, made.num_warps, str(specialize(made))), (place, made))
        for output in made.outputs:
            output.zero_()
        return made.outputs

    return run


def use(model: torch.nn.Module, config: rosa.AdapterConfig) -> None:
    """All that is launched in training, in evaluation, and for rows with adapters of their own."""
    rosa.patch(model, config, "one")
    model(IDS).logits.float().sum().backward()
    rosa.patch(model, config, "other")
    with torch.no_grad():
        model(IDS)
        with rosa.adapters_by_row(model, ["one", "other"]):
            model(IDS)


def main() -> None:
    dispatch.choose_backend = road_dispatch.choose_backend = lambda backend, q: "triton"
    for family, config in ((family, config) for family, configs in CONFIGS.items() for config in configs):
        launch.run_launch = road_triton.run_launch = look(f"{family}, {config}")
        use(make_model(family).bfloat16(), config)
    for (kernel, *_), (place, made) in SEEN.items():
        try:
            compile_launch(made, "sm_90")
        except Exception as error:
            print(f"{kernel} of {place}: {error}")
    print(len(SEEN))


if __name__ == "__main__":
    main()
