"""The kernels compiled for GPUs that are not there. Each test is a process: the interpreter excludes the compiler."""

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys
from rosa_kernels.offline import SHAPES, report
for shape in SHAPES:
    for r in report(shape, sys.argv[1]):
        print(r.kernel, r.shape, r.registers, r.spill_bytes, r.widest_load, r.widest_store)
"""


def run(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=kept | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_no_spills_and_128_bit_accesses(arch):
    lines = run("-c", PROGRAM, arch).stdout.splitlines()
    assert len(lines) == 6  # two kernels at three models' shapes
    for line in lines:
        _, _, registers, spills, load, store = line.split()
        assert (spills, load, store) == ("0", "128", "128"), line
        assert int(registers) <= 128, line  # four warps, so that four programs share a multiprocessor's registers


SPECIALIZATIONS = """
from rosa_kernels.offline import SHAPES, Shape, launches, specialize
for shape in (*SHAPES, Shape("heads of 80", 5, 1, 80, 10)):
    kinds = [[specialize(launch) for launch in launches(shape, batch, seq)]
             for batch, seq in ((2, 64), (1, 1), (1, 64), (3, 17), (16, 230), (1, 4097), (1, 131072))]
    print(all(kind == kinds[0] for kind in kinds))
"""


def test_one_binary_serves_every_batch_and_sequence():
    done = run("-c", SPECIALIZATIONS)
    assert done.stdout.split() == ["True"] * 4, done.stderr


def test_the_report_is_printed_in_a_process_that_has_the_interpreter_too():
    done = run("-m", "rosa_kernels.offline", "sm_86", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "rope_roae_forward_kernel   Qwen2.5-7B" in done.stdout and "RTX 3090" in done.stdout


def test_unknown_architectures_are_named():
    from rosa_kernels import offline

    with pytest.raises(ValueError, match="sm_80, sm_86, sm_89, sm_90, got sm_42"):
        offline.main(["sm_42"])


def test_bytes_are_counted_from_what_is_launched():
    from rosa_kernels.offline import SHAPES, bytes_per_token, launches

    forward, backward = launches(SHAPES[0], dtype=torch.bfloat16)
    heads, low, rotary = 28 + 4, (28 + 4) * 32, 2 * 64
    # Read q and k, write them; write the low pairs, read the signals, cos and sin.
    assert bytes_per_token(forward) == 2 * (2 * heads * 128 + 2 * low + rotary)
    # Read their gradients, write those of the inputs; read the low pairs and the signals, write the signals' gradients.
    assert bytes_per_token(backward) == 2 * (2 * heads * 128 + 3 * low + rotary)
