"""What the host does for a launch, on a machine without its GPU: a driver for Triton that launches nothing, and the
launch functions with arguments of a model's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as of_triton

from rosa_kernels import kept, road_triton, roae_triton, rope_road_triton, rope_roae_triton
from rosa_kernels.reference import half_width
from rosa_kernels.shapes import RANK, Shape

DEVICE = -1  # as torch numbers the CPU: on a machine with GPUs theirs are left alone


class StubDriver:
    """Has kernels compiled for an H100, and calls `launched` with what Triton's launcher gets in place of the driver.

    Attributes:
        launched (callable): gets programs (three numbers), stream, kernel, metadata of kernel and launch, the two
            hooks, and the kernel's arguments.
        stream (int): the current one.
    """

    def __init__(self, launched: Callable[..., None]):
        self.launched, self.stream = launched, 0
        # Compiled kernels keep their launcher; another driver may be active by then.
        self.launcher_cls = lambda source, metadata: lambda *arguments: of_triton.active.launched(*arguments)
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (name, binary, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def stubbed(launched: Callable[..., None] = lambda *_: None) -> Iterator[StubDriver]:
    """Triton with a StubDriver, and no launches kept from outside."""
    driver, before = StubDriver(launched), kept.KEPT
    of_triton.set_active(driver)
    kept.KEPT = {}
    try:
        yield driver
    finally:
        kept.KEPT = before
        if torch.cuda.is_available():
            of_triton.reset_active()


def calls(shape: Shape, batch: int, seq: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Callable, tuple]]:
    """Every launch function, by name, with arguments as a training step has them, on the CPU."""
    empty = partial(torch.empty, dtype=dtype)
    q, k = heads = [empty(batch, seq, n, shape.head_dim).transpose(1, 2) for n in (shape.heads, shape.key_heads)]
    rotary_dim = shape.rotary_dim or shape.head_dim
    rotary = [half_width(empty(1, seq, rotary_dim), rotary_dim, shape.interleaved) for _ in "cs"]
    inputs, layout = (*heads, *rotary), (0.1, shape.interleaved)

    columns, key_columns = (2 * n * shape.low_pairs for n in (shape.heads, shape.key_heads))
    latent, up = empty(batch * seq, RANK), empty(columns, RANK)
    gqa_down, gqa_up = empty(RANK, columns), empty(key_columns, RANK)
    low, key_latent, dkey_latent = empty(batch * seq, columns + key_columns), empty(latent.shape), empty(latent.shape)
    needs = (True, True, True, True)  # sequence_major, and three gradients
    roae = (*inputs, latent, up, gqa_down, gqa_up, *layout, True)
    roae_keys = (k, *rotary, gqa_up, low, key_latent, shape.heads, *layout, *needs)
    roae_backward = (*inputs, latent, up, gqa_down, low, dkey_latent, *layout, *needs)

    signals = (empty(batch, seq, columns), empty(batch, seq, key_columns))
    x, kept_x = empty(batch, seq, shape.heads * shape.head_dim), empty(batch, seq, shape.heads * shape.head_dim)
    query, key = ([torch.empty(n * shape.head_dim) for _ in "ta"] for n in (shape.heads, shape.key_heads))
    q_kept, k_kept = torch.empty_like(q), torch.empty_like(k)
    pairing = (2, 2, 2)  # variant, group, head_dim
    sums = road_triton.backward_launch(x, kept_x, *query, None, *pairing, True).outputs[1]
    rope_road = (*inputs, None, *query, *key)
    return {
        "roae forward": (roae_triton.forward_launch, roae),
        "roae keys' backward": (roae_triton.backward_keys_launch, roae_keys),
        "roae backward": (roae_triton.backward_launch, roae_backward),
        "rope_roae forward": (rope_roae_triton.forward_launch, (*inputs, *signals, *layout, True)),
        "rope_roae backward": (
            rope_roae_triton.backward_launch,
            (*inputs, *signals, low, *layout, True, [True] * 4),
        ),
        "road forward": (road_triton.forward_launch, (x, *query, None, *pairing)),
        "road backward": (road_triton.backward_launch, (x, kept_x, *query, None, *pairing, True)),
        "road sums": (road_triton.reduce_launch, (sums, None, *query, None, None, 2, [True, True, False, False])),
        "rope_road forward": (rope_road_triton.forward_launch, (*rope_road, 2, True, shape.interleaved)),
        "rope_road backward": (
            rope_road_triton.backward_launch,
            (*rope_road, q_kept, k_kept, 2, True, shape.interleaved, True, True, True),
        ),
    }
