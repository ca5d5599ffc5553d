"""The suite and the script for GPU machines as they are run: in a process of their own, small on a CPU."""

import os
import subprocess
import sys

import pytest

from benchmarks.liger import LIGER
from benchmarks.methods import METHODS
from benchmarks.passes import MODES
from benchmarks.presets import PRESETS, largest_that_fits, needed_bytes
from benchmarks.providers import ROPE_ROAE
from benchmarks.report import ROOT
from benchmarks.results import read

# As the suite is run by hand: without the interpreter that the tests' kernels need, and outside this pytest.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "ROSA_", "PYTEST_"))}
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)


def test_every_benchmark_runs(tmp_path):
    """Once each and untimed; those that are for GPUs say so."""
    done = run(sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "--results", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout
    assert "liger is for GPUs" in done.stdout and "compiled is for GPUs" in done.stdout
    rows = read(tmp_path / "rows.json").rows
    assert {(row["group"], row["provider"]) for row in rows} >= {("roae", provider) for provider in ("eager", "fused")}
    assert {row["mode"] for row in rows} == {"accuracy"}, "without times there are no other rows"


def test_one_group_writes_its_rows(tmp_path):
    path = tmp_path / "rows.json"
    done = run(
        sys.executable, "-m", "pytest", "benchmarks/bench_rope_roae.py", "benchmarks/bench_machine.py",
        "--results", path, "--benchmark-max-time=0.05",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "They say nothing about a GPU" in done.stdout
    rows = read(path).rows
    found = {(row["provider"], row["mode"]) for row in rows if row["group"] == "rope_roae"}
    on_a_cpu = [provider for provider in ROPE_ROAE if provider not in ("liger", "compiled")]
    assert found == {(provider, mode) for provider in on_a_cpu for mode in (*MODES, "accuracy")}
    assert {"copy", "matmul"} < {row["group"] for row in rows}
    assert all(row["output_relative_l2"] < 1e-6 for row in rows if row["mode"] == "accuracy")


def test_the_script_runs_a_part_and_leaves_logs_and_rows(tmp_path):
    done = run("bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "training")
    assert done.returncode == 0, done.stdout
    files = sorted(path.name.rpartition("_")[2] for path in (tmp_path / "out").iterdir())
    assert files == ["summary.txt", "training.json", "training.txt"]
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "no GPU here" in summary and "training: passed in" in summary
    rows = [row for row in read(next((tmp_path / "out").glob("*.json"))).rows if row["group"] == "training_step"]
    assert [row["provider"] for row in rows] == [method for method in METHODS if LIGER not in method]
    assert {row["steps"] for row in rows if row["provider"].startswith("RoSA")} == {40}, "a whole interval of DLS"
    trainable = {row["provider"]: row["trainable_parameters"] for row in rows}
    assert trainable["frozen floor"] == 0 and trainable["RoSA skip"] == trainable["RoSA mask"] > 0


def test_the_script_refuses_unknown_parts_before_it_does_anything(tmp_path):
    done = run("bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "ops", "speed")
    assert done.returncode == 2 and "unknown part 'speed'; parts: tests ops layers training" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("gigabytes", "preset"), [(141, "7b"), (80, "7b"), (40, "1.5b"), (24, "0.5b")])
def test_the_default_preset_is_the_largest_that_fits(gigabytes, preset):
    assert largest_that_fits(4096, gigabytes * 1e9) == preset


def test_presets_are_the_true_sizes():
    """Parameters from the models' cards, in billions, the embeddings counted once where they are tied."""
    for name, billions in (("0.5b", 0.494), ("1.5b", 1.544), ("7b", 7.616)):
        assert needed_bytes(PRESETS[name], 0) / 2e9 == pytest.approx(billions, rel=2e-3)
