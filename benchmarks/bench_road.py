"""The op `road`: RoAd of a linear layer's output as wide as the model, beside peft's and beside plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from peft.tuners.road.layer import _apply_road
from torch import Tensor

from benchmarks.cases import CASES, DEVICE, DTYPE, HIDDEN, Case
from benchmarks.passes import MODES, one_pass
from rosa_kernels import road, road_reference


class RoadInputs(NamedTuple):
    """h `[b, l, d]`, theta and alpha `[numbers]` in float32; all need gradients."""

    h: Tensor
    theta: Tensor
    alpha: Tensor


def peft(x: RoadInputs, variant: int) -> Tensor:
    """As peft's layer computes it, pairs in its default groups of 64."""
    wide = x.h.to(x.theta.dtype)
    return _apply_road(f"road_{variant}", 64, x.theta, x.alpha, wide).to(x.h.dtype)


def eager(x: RoadInputs, variant: int) -> Tensor:
    """Eq. 4, operation by operation."""
    return road_reference(*x, variant=variant)


def fused(x: RoadInputs, variant: int) -> Tensor:
    """The Triton kernels on a GPU, the reference elsewhere."""
    return road(*x, variant=variant)


PROVIDERS = {"peft": peft, "eager": eager, "fused": fused}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_road(measure, case, variant, provider, mode):
    x = inputs(case, variant)
    run = one_pass(mode, lambda: [PROVIDERS[provider](x, variant)], x)
    labels = case.labels | {"shape": f"{case.shape.name}, RoAd_{variant}"}
    moved = {"bytes": tensor_bytes(x.h, mode)} if provider == "fused" else {}
    measure(run, group="road", provider=provider, mode=mode, **labels, **moved)


def inputs(case: Case, variant: int) -> RoadInputs:
    """Random inputs; angles and scales near the identity's."""
    width = HIDDEN[case.shape.name]
    numbers = width // 2 if variant == 1 else width
    theta, alpha = (torch.randn(2, numbers, device=DEVICE) * 0.1).unbind()
    h = torch.randn(case.batch, case.seq, width, dtype=DTYPE, device=DEVICE)
    return RoadInputs(*(t.clone().requires_grad_() for t in (h, theta, alpha + 1)))


def tensor_bytes(h: Tensor, mode: str) -> int:
    """Bytes of the tensors that are as large as h, each moved once: h and z; their gradients and what was saved."""
    return h.nbytes * {"forward": 2, "backward": 3, "both": 5}[mode]
