"""The processes of a comparison: each sees the GPU that is its own."""

import os
import time
from pathlib import Path

import pytest
import torch

from rosa.comparison.workers import submit, workers


def seen(folder: Path, processes: int) -> str | None:
    """What a process sees, once as many as these are there: none does the others' calls."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < processes:
        time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(("named", "expected"), [(None, {"0", "1"}), ("3,GPU-5,7", {"3", "GPU-5"})])
def test_each_sees_one_gpu_of_those_that_are_visible(monkeypatch, tmp_path, named, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with workers(2) as pool:
        found = {future.result() for future in submit(pool, seen, [(tmp_path, 2)] * 2)}
    assert found == expected


def test_without_a_gpu_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with workers(1) as pool:
        assert pool.submit(seen, tmp_path, 1).result() is None
