"""A kernel whose loops and branches are plain, compiled for the architectures named: what its walk counts, a line each.

Run as a process of its own, by `test_bounds.py`.
"""

import sys

import torch
import triton
import triton.language as tl

from rosa_kernels.launch import Launch
from rosa_kernels.offline import walk_launch

WIDTH = 128  # a number a thread
PROGRAMS, GROUP, OTHERS, SPLIT = 84, 10, 3, 7


@triton.jit(do_not_specialize=["group", "others"])
def counted_kernel(x, out, counter, group, others, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.program_id(0)
    o = tl.arange(0, WIDTH)
    b_sum = tl.zeros((WIDTH,), tl.float32)
    for j in range(i % group // others):
        for n in range(others + 1):
            b_sum += tl.load(x + (j + n * i) * WIDTH + o)
    if i < group:
        for j in range(5, i, -1):
            tl.store(out + j * WIDTH + o, b_sum, mask=o % 4 == 0)
    if tl.atomic_add(counter + i // SPLIT, 1) == SPLIT - 1:  # the last of SPLIT programs
        tl.store(out + i * WIDTH + o, b_sum)


def launch() -> Launch:
    numbers = torch.empty(PROGRAMS * WIDTH, device="meta")
    counter = torch.empty(PROGRAMS, dtype=torch.int32, device="meta")
    arguments = dict(x=numbers, out=numbers.clone(), counter=counter, group=GROUP, others=OTHERS)
    return Launch(counted_kernel, PROGRAMS, 4, arguments | dict(SPLIT=SPLIT, WIDTH=WIDTH), ())


if __name__ == "__main__":
    for arch in sys.argv[1:]:
        walked = walk_launch(launch(), arch)
        threads = {kind: 0 for kind in ("load", "store", "atomic")}
        for i, number in zip(walked.code, walked.threads.tolist(), strict=True):
            if i.kind in threads:
                threads[i.kind] += number
        print(arch, *threads.values())
