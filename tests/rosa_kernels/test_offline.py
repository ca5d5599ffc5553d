"""The kernels compiled for GPUs that are not there."""

import os
import subprocess
import sys

import pytest
import torch

from rosa_kernels.shapes import SHAPES

PROGRAM = """
import sys, torch
from rosa_kernels.offline import SHAPES, Shape, launches, report, road_launches
shapes = {shapes}
roae_alone = lambda *of: [launch for launch in launches(*of) if launch.kernel.fn.__name__.startswith("roae")]
rope_roae_alone = lambda *of: [launch for launch in launches(*of) if launch.kernel.fn.__name__.startswith("rope")]
for shape in shapes:
    for r in report(shape, sys.argv[1], torch.{dtype}, [{launched}]):
        print(r.kernel, shape.name.replace(" ", "_"), r.registers, r.spill_bytes, r.shared_bytes,
              r.widest_load, r.widest_store)
"""
ROAE = ("roae_forward", "roae_backward_keys", "roae_backward", "rope_roae_forward", "rope_roae_backward")
ROAD = ("road_forward", "road_backward", "road_reduce", "rope_road_forward", "rope_road_backward", "road_reduce")
KERNELS = ROAE + ROAD
LAYOUTS = """(
    Shape("interleaved", 28, 4, 128, 16, interleaved=True),
    Shape("interleaved heads of 256", 16, 8, 256, 32, interleaved=True),
    Shape("half of the head, interleaved", 32, 2, 128, 8, rotary_dim=64, interleaved=True),
    Shape("a part of the head", 32, 32, 80, 4, rotary_dim=32),
    Shape("heads of 32, as many key heads", 8, 8, 32, 4),
    Shape("heads of 64, 32 to one key head", 32, 1, 64, 8),
    Shape("heads of 80", 32, 8, 80, 10),
    Shape("heads of 96", 32, 8, 96, 12),
    Shape("heads of 512", 8, 1, 512, 64),
    Shape("r_low of 0.5", 28, 4, 128, 32),
)"""


@pytest.fixture
def compiled(compiler):
    """Of every kernel: its name, shape, registers, spilled bytes, shared bytes, widest load and store in bits."""

    def rows(arch, shapes="SHAPES", dtype="bfloat16", launched="launches"):
        found = compiler(PROGRAM.format(shapes=shapes, dtype=dtype, launched=launched), arch)
        return [(kernel.removesuffix("_kernel"), shape, *map(int, numbers)) for kernel, shape, *numbers in found]

    return rows


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_no_spills_and_128_bit_accesses(compiled, arch):
    shapes = SHAPES[:1] if arch == "sm_89" else SHAPES  # it has sm_86's instructions and registers
    rows = compiled(arch, f"SHAPES[:{len(shapes)}]") + compiled(arch, "SHAPES[:1]", launched="road_launches")
    assert [row[0] for row in rows] == [*ROAE] * len(shapes) + [*ROAD]
    for row in rows:
        kernel, _, registers, spills, shared, load, store = row
        # The rows of sums become one row: what is stored is little.
        assert (spills, load, store) == (0, 128, 32 if kernel == "road_reduce" else 128), row
        # With four warps a program: four programs, or three at 168, share a multiprocessor's registers and memory.
        # (Triton takes more on sm_100: 3.6 174 of the last, 3.7 132 for RoAd's largest.)
        most = 176 if kernel.startswith("roae") else 136 if kernel == "rope_road_backward" else 128
        assert registers <= most and shared <= 32 * 1024, row


def test_compiles_for_an_amd_gpu_without_spills(compiled):
    rows = compiled("gfx942") + compiled("gfx942", "SHAPES[:1]", launched="road_launches")
    assert [row[0] for row in rows] == [*ROAE] * 3 + [*ROAD]
    assert all(row[3] == 0 and row[5] >= 64 for row in rows), rows  # a program has twice the threads: half as wide each


def test_every_layout_and_head_size_compiles_to_wide_loads(compiled):
    rows = compiled("sm_86", LAYOUTS)
    assert len({row[1] for row in rows}) == 10
    for row in rows:
        assert row[3] <= 16 and row[5] == 128, row  # ptxas spills up to four registers rather than use one over 128


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_dtype_compiles_to_wide_loads(compiled, dtype):
    # A GPU runs roae's one launch in 16-bit dtypes alone: it would spill in the others.
    launched = "launches" if dtype == "float16" else "rope_roae_alone"
    rows = compiled("sm_90", "SHAPES[:1]", dtype, f"{launched}, road_launches")
    assert [row[0] for row in rows] == [*(ROAE if dtype == "float16" else ROAE[3:]), *ROAD]
    for row in rows:
        kernel, _, _, spills, _, *widths = row
        # Cosines of float64 keep a table in local memory, for huge angles.
        assert spills <= (16 if dtype != "float64" or kernel.startswith("rope_roae") else 64), row
        assert widths[0] == 128 and (widths[1] == 128 or kernel == "road_reduce"), row


CORNERS = """(
    Shape("64 low-frequency pairs", 8, 2, 512, 64),
    Shape("every pair of a head of 128", 8, 2, 128, 64),
    Shape("half of the pairs of a head of 256", 8, 2, 256, 64),
    Shape("as many key heads", 8, 8, 256, 64),
)"""


def test_what_is_let_into_one_launch_fits_every_card(compiled):
    for arch, most in (("sm_86", 99), ("gfx942", 64)):  # KiB of shared memory of a program; sm_86 is an RTX 3090
        rows = compiled(arch, CORNERS, launched="roae_alone")
        assert {row[0] for row in rows} == {*ROAE[:3]} and all(row[4] <= most * 1024 for row in rows), rows


VARIANTS = """
from rosa_kernels.offline import SHAPES, Shape, compile_launch, disassemble, road_launches, _nvidia_usage
partial = Shape("partial", 32, 32, 80, 4, rotary_dim=32)
for shape, variant, neighbours, indexed in (
    (SHAPES[0], 1, True, True), (SHAPES[0], 1, False, False), (SHAPES[0], 4, True, False),
    (partial, 1, True, False), (partial, 2, False, True),
):
    for launch in road_launches(shape, variant=variant, neighbours=neighbours, indexed=indexed):
        cubin = compile_launch(launch, "sm_86").asm["cubin"]
        print(launch.kernel.fn.__name__, shape.name, variant, neighbours, *_nvidia_usage(cubin).values(),
              disassemble(cubin)[1].count("LDG.E.U16"))
"""


def test_roads_variants_and_pairings_compile_without_spills_to_128_bit_accesses(compiler):
    rows = compiler(VARIANTS)
    assert len(rows) == 5 * len(ROAD)
    for kernel, shape, _, neighbours, *numbers in rows:
        registers, spills, load, store, narrow_loads = map(int, numbers)
        assert registers <= 144 and spills == 0, (kernel, shape, numbers)
        # Of a head that begins with a group and goes on in neighbours, `road` reads each by itself.
        if shape == "Qwen2.5-7B" or neighbours == "True" or kernel.startswith("rope_road"):
            assert load == 128 and narrow_loads == 0, (kernel, shape, numbers)
            assert store == 128 or kernel == "road_reduce_kernel", (kernel, shape, numbers)


def test_interleaved_cos_is_loaded_wide(compiler):
    assert compiler(NARROW_LOADS) == [["0"]] * len(KERNELS)


NARROW_LOADS = """
from rosa_kernels.offline import Shape, compile_launch, disassemble, launches, road_launches
shape = Shape("interleaved", 28, 4, 128, 16, interleaved=True)
for launch in (*launches(shape), *road_launches(shape)):
    print(disassemble(compile_launch(launch, "sm_90").asm["cubin"])[1].count("LDG.E.U16"))
"""

ALONE = """
from functools import partial
import torch
from rosa_kernels import rope_road_triton
from rosa_kernels.offline import compile_launch

empty = partial(torch.empty, device="meta")

def heads(n):
    return empty(1, 64, n, 64, dtype=torch.bfloat16).transpose(1, 2)

def weights(n, dtype):
    return [None] * 2 if dtype is None else [empty(n * 64, dtype=dtype)] * 2

q, k, cos = heads(4), heads(2), empty(1, 64, 32, dtype=torch.bfloat16)
for query, key in ((torch.float32, None), (None, torch.float32), (torch.float32, torch.bfloat16)):
    theta = *weights(4, query), *weights(2, key)
    for launch in (
        rope_road_triton.forward_launch(q, k, cos, cos, None, *theta, 2, True, False),
        rope_road_triton.backward_launch(
            q, k, cos, cos, None, *theta, None if query is None else q, None if key is None else k, 2, True, False,
            True, True, True),
    ):
        compile_launch(launch, "sm_90")
        print(launch.kernel.fn.__name__)
"""


def test_road_of_queries_or_keys_alone_compiles_and_in_dtypes_of_their_own(compiler):
    assert compiler(ALONE) == [["rope_road_forward_kernel"], ["rope_road_backward_kernel"]] * 3


SPECIALIZATIONS = """
from rosa_kernels.offline import SHAPES, Shape, launches, road_launches, specialize
for shape in (*SHAPES, Shape("heads of 80", 5, 1, 80, 10)):
    kinds = [[specialize(launch) for launch in (
                 *launches(shape, batch, seq), *road_launches(shape, batch, seq),
                 *road_launches(shape, batch, seq, variant=1, neighbours=False, indexed=True))]
             for batch, seq in ((2, 64), (1, 1), (1, 64), (3, 17), (16, 230), (1, 4097), (1, 131072))]
    print(len(kinds[0]), all(kind == kinds[0] for kind in kinds))
"""


def test_one_binary_serves_every_batch_and_sequence(compiler):
    assert compiler(SPECIALIZATIONS) == [[str(len(ROAE) + 2 * len(ROAD)), "True"]] * 4


ODD_STRIDES = """
from functools import partial
import torch
from rosa_kernels import road_triton, roae_triton, rope_road_triton, rope_roae_triton
from rosa_kernels.offline import specialize

empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")

def odd(t):
    return t.as_strided(t.shape, [1 if size == 1 else stride for size, stride in zip(t.shape, t.stride())])

def launched(seq, heads, change):
    q, k = (change(empty(2, seq, n, 128).transpose(1, 2)) for n in (heads, 1))
    cos, x = change(empty(1, seq, 64)), change(empty(1, seq, heads * 128))
    signals = [change(empty(2, seq, n * 32)) for n in (heads, 1)]
    latent, up, gqa = empty(2 * seq, 128), empty(heads * 32, 128), (empty(128, heads * 32), empty(32, 128))
    query, key = [empty(heads * 128)] * 2, [empty(128)] * 2
    return [specialize(launch) for launch in (
        roae_triton.forward_launch(q, k, cos, cos, latent, up, *gqa, 0.1, False, True),
        rope_roae_triton.forward_launch(q, k, cos, cos, *signals, 0.1, False, True),
        rope_road_triton.forward_launch(q, k, cos, cos, None, *query, *key, 2, True, False),
        road_triton.forward_launch(x, *query, None, 2, 2, 2),
    )]

for heads in (28, 1):
    for seq in (1, 40):
        print(launched(seq, heads, odd) == launched(40, heads, lambda t: t))
"""


def test_a_stride_of_1_in_a_dimension_of_size_1_makes_no_other_binary(compiler):
    """Of one token, as in decoding, of one head and of one sequence."""
    assert compiler(ODD_STRIDES) == [["True"]] * 4


REPORT = """
from unittest import mock
from rosa_kernels import offline
with mock.patch.object(offline, "SHAPES", offline.SHAPES[:1]):
    offline.main(["sm_86"])
"""


def test_the_report_is_a_row_of_use_and_a_row_of_bounds_for_every_kernel(compiler):
    rows = [row[:3] for row in compiler(REPORT) if row and row[0].endswith("_kernel")]
    assert rows == [[f"{kernel}_kernel", "Qwen2.5-7B", "sm_86"] for kernel in KERNELS] * 2


def test_the_report_is_printed_in_a_process_that_has_the_interpreter_too():
    """For AMD's card: its machine code is text already, and its bounds are not known."""
    done = subprocess.run(
        [sys.executable, "-m", "rosa_kernels.offline", "gfx942"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for shape in SHAPES:
        for kernel in KERNELS:
            assert f"{kernel}_kernel".ljust(26) + f" {shape.name}" in done.stdout
    assert "MI300X" in done.stdout


def test_unknown_architectures_are_named():
    from rosa_kernels import offline

    with pytest.raises(ValueError, match="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, got sm_42"):
        offline.main(["sm_42"])


def test_bytes_are_counted_from_what_is_launched():
    from rosa_kernels.offline import SHAPES, bytes_per_token, launches

    seq = 4096
    shape_launches = list(launches(SHAPES[0], seq=seq, dtype=torch.bfloat16))
    heads, key_heads, low, key_low, rotary, rank = 28 * 128, 4 * 128, 28 * 32, 4 * 32, 2 * 64, 128
    weights = {"up": low * rank / seq, "gqa_down": low * rank / seq, "gqa_up": key_low * rank / seq}
    expected = (
        # Read q, k and the latent, write q, k, the low pairs and Eq. 3's latent.
        2 * (heads + key_heads) + low + key_low + rotary + 2 * rank + sum(weights.values()),
        # Read dk, the low pairs (the keys' alone; all are counted) and Eq. 3's latent; write dk, dS_K and its gradient.
        2 * key_heads + low + 2 * key_low + rotary + 2 * rank + weights["gqa_up"],
        # Read dq, the low pairs, the latent and the gradient of Eq. 3's; write dq, dU and S.
        2 * heads + low + key_low + 2 * low + rotary + 2 * rank + weights["up"] + weights["gqa_down"],
        # Read q and k, write them; write the low pairs, read the signals, cos and sin.
        2 * (heads + key_heads) + 2 * (low + key_low) + rotary,
        # Read their gradients, write those of the inputs; read the low pairs and the signals, write the signals'.
        2 * (heads + key_heads) + 3 * (low + key_low) + rotary,
    )
    for launch, numbers in zip(shape_launches, expected, strict=True):
        assert bytes_per_token(launch, seq) == pytest.approx(2 * numbers), launch.kernel


def test_bytes_of_road_are_counted_too():
    from rosa_kernels.offline import SHAPES, bytes_per_token, road_launches

    seq = 2048
    forward, backward, reduce, rope_forward, rope_backward, _ = road_launches(SHAPES[0], seq=seq, variant=1)
    heads, key_heads, rotary = 28 * 128, 4 * 128, 2 * 64
    weights, key_weights = 2 * 4 * heads / 2 / seq, 2 * 4 * key_heads / 2 / seq  # theta and alpha, float32
    sums = backward.outputs[1].numel() * 4 / seq
    # Read x and write z; read the output and its gradient and write x's and the sums; read these.
    assert bytes_per_token(forward, seq) == pytest.approx(2 * 2 * heads + weights)
    assert bytes_per_token(backward, seq) == pytest.approx(3 * 2 * heads + weights + sums)
    assert bytes_per_token(reduce, seq) == pytest.approx(sums + 2 * weights)
    both = 2 * (heads + key_heads), weights + key_weights + 2 * rotary
    assert bytes_per_token(rope_forward, seq) == pytest.approx(2 * both[0] + both[1])
    sums = rope_backward.outputs[2].numel() * 4 / seq
    assert bytes_per_token(rope_backward, seq) == pytest.approx(3 * both[0] + both[1] + sums)
