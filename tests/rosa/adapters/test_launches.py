"""What models launch compiles for GPUs, in their own dtypes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_what_models_in_16_bits_launch_compiles():
    program = [sys.executable, "-W", "ignore", "-m", "tests.rosa.adapters.launches"]
    made = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr
    *faults, compiled = made.stdout.splitlines()
    assert not faults and int(compiled) > 50, made.stdout
