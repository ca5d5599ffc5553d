"""Tests that change a constant of the launch functions have launches of their own kept; the compiler has a process of
its own, since the interpreter excludes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rosa_kernels import kept


@pytest.fixture(autouse=True)
def _none_kept(monkeypatch):
    monkeypatch.setattr(kept, "KEPT", {})


@pytest.fixture(scope="session")
def compiler():
    """Runs a Python program with arguments where kernels are compiled; returns the lines that it printed, in words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("compiler.py")],
        env=environment, cwd=Path(__file__).parents[2], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def run(program, *arguments):
        process.stdin.write(json.dumps([program, arguments]) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline() or '{"error": "the compiler\'s process has ended"}')
        assert "printed" in answer, answer["error"]
        return [line.split() for line in answer["printed"].splitlines()]

    yield run
    process.stdin.close()
    process.wait()
