"""Launches kept by layout: what reaches the launcher without a GPU, and results equal to the long way's on one."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rosa_kernels import kept, rope_roae
from rosa_kernels.kept import run_launch
from rosa_kernels.rope_roae_triton import forward_launch

STUBBED = Path(__file__).with_name("stubbed_launches.py")


def test_kept_launches_reach_the_launcher_as_the_long_way_does():
    """In a process of its own: the interpreter excludes the compiler. It fails with what failed there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", STUBBED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=STUBBED.parents[2])
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


def test_the_interpreter_keeps_nothing():
    if torch.cuda.is_available():
        pytest.skip("the GPU runs these tests")
    arguments = make_arguments(2, 5, "cpu", torch.float32)
    first, second = (run_launch(forward_launch, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not kept.KEPT


def make_arguments(batch, seq, device, dtype=torch.bfloat16, offset=0):
    """Of `forward_launch`; every tensor begins `offset` elements after an aligned address."""

    def normal(*shape):
        room = torch.randn(torch.Size(shape).numel() + offset, device=device).to(dtype)
        return room[offset:].view(shape)

    q, k = (normal(batch, seq, heads, 32).transpose(1, 2) for heads in (4, 2))
    rotary, signals = (normal(1, seq, 16), normal(1, seq, 16)), (normal(batch, seq, 32), normal(batch, seq, 16))
    return q, k, *rotary, *signals, 0.1, False, True


def assert_as_the_long_way(arguments):
    expected = forward_launch(*arguments).run()
    assert all(torch.equal(a, b) for a, b in zip(run_launch(forward_launch, *arguments), expected, strict=True))


@pytest.mark.gpu
def test_equal_to_the_long_way_for_alternating_shapes_and_alignments():
    cases = [
        make_arguments(*case, "cuda", offset=offset) for case in ((2, 5), (1, 1), (3, 300)) for offset in (0, 1, 8)
    ]
    for _ in range(3):
        for arguments in cases:
            assert_as_the_long_way(arguments)
    assert len(kept.KEPT) == 6  # 8 elements are 16 bytes


@pytest.mark.gpu
def test_launched_on_the_current_stream_of_each_thread():
    arguments = make_arguments(2, 300, "cuda")
    expected = run_launch(forward_launch, *arguments)
    failures = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                q = torch.zeros_like(arguments[0]).add_(arguments[0])  # not there yet on another stream
                if not torch.equal(run_launch(forward_launch, q, *arguments[1:])[0], expected[0]):
                    failures.append(q)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.gpu
def test_a_kept_launch_is_captured_in_a_cuda_graph():
    arguments = make_arguments(2, 5, "cuda")
    run_launch(forward_launch, *arguments)
    assert len(kept.KEPT) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_launch(forward_launch, *arguments)
    assert len(kept.KEPT) == 1
    arguments[0].normal_()
    graph.replay()
    expected = forward_launch(*arguments).run()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_device_has_launches_of_its_own():
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        assert_as_the_long_way(make_arguments(2, 5, device))
        assert torch.cuda.current_device() == 0
    assert len(kept.KEPT) == 2


@pytest.mark.gpu
def test_gradients_of_changing_lengths_equal_those_of_the_long_way():
    def gradients(seq):
        torch.manual_seed(seq)
        q, k, cos, sin, *signals, alpha, _, _ = make_arguments(2, seq, "cuda")
        leaves = [t.requires_grad_() for t in (q, k, *signals)]
        q_out, k_out = rope_roae(q, k, cos, sin, *signals, alpha=alpha)
        return torch.autograd.grad(q_out.square().sum() + k_out.square().sum(), leaves)

    lengths = (5, 64, 230)
    expected = [gradients(seq) for seq in lengths]  # the first of a layout goes the long way
    count = len(kept.KEPT)
    for _ in range(3):
        for seq, grads in zip(lengths, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(gradients(seq), grads, strict=True))
    assert len(kept.KEPT) == count == 2 * len(lengths)
