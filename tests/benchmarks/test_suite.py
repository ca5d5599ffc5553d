"""The suite and the script for GPU machines as they are run: in a process of their own, small on a CPU."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.bench_launch_shape import AS_IT_IS, CHANGES
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
PARTS = ["tests", "ops", "layers", "training", "decode", "host"]  # of the script, where none is asked for
WITHOUT_ROWS = ("tests", "host")


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT | environment)


def gpu_script(out, *parts, options):
    """The script with pytest's options, in one process; its temporary files lie where there are no others'."""
    settings = dict(PYTEST_ADDOPTS=f"--basetemp={out}.temporary {options}", PYTEST_XDIST_AUTO_NUM_WORKERS="0")
    return run("bash", "benchmarks/gpu.sh", out, *parts, **settings)


def rows_of(out, part):
    (path,) = out.glob(f"*_{part}.json")
    return read(path).rows


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """All parts, but of the tests one, which is of both kinds, and benchmarks timed as briefly as can be."""
    out = tmp_path_factory.mktemp("dry_run") / "out"
    options = "--ignore=tests/rosa -k 'bench_ or test_launches' --benchmark-max-time=0.01 --benchmark-min-rounds=1"
    return gpu_script(out, *(f"{part}=300" for part in PARTS), options=options), out


def test_the_benchmarks_run_untimed(tmp_path):
    """Once each, those that no part of the script has or that say what they leave out; those for GPUs say so."""
    chosen = [f"benchmarks/bench_{name}.py" for name in ("roae", "rope_roae", "dispatch", "mixed_batch")]
    done = run(sys.executable, "-m", "pytest", *chosen, "--benchmark-disable", "--results", tmp_path / "rows.json")
    assert done.returncode == 0, done.stdout
    assert "liger is for GPUs" in done.stdout and "compiled is for GPUs" in done.stdout
    rows = read(tmp_path / "rows.json").rows
    assert {(row["group"], row["provider"]) for row in rows} >= {("roae", provider) for provider in ("eager", "fused")}
    assert {row["mode"] for row in rows} == {"accuracy"}, "without times there are no other rows"


def test_the_script_runs_every_part_and_leaves_log_rows_and_summary(dry_run):
    done, out = dry_run
    assert done.returncode == 0, done.stdout
    summary = (out / "summary.txt").read_text()
    passed = re.findall(r"^(\w+): passed in", summary, re.MULTILINE)
    assert passed == ["tests", *PARTS], "the tests that need a GPU, the kernels' others, and every other part once"
    assert "no GPU here" in summary and "Speed and memory on a GPU: still to be measured" in summary
    kept = sorted(path.name.rpartition("_")[2] for path in out.iterdir())
    rows = [f"{part}.json" for part in PARTS if part not in WITHOUT_ROWS]
    assert kept == sorted(["log.txt", "summary.txt", *rows]) and len(kept) <= 8
    log = (out / "log.txt").read_text()
    assert re.findall("^== (.*)", log, re.MULTILINE) == PARTS
    assert "They say nothing about a GPU" in log


def test_the_scripts_limits_leave_half_a_minute_of_nine():
    """The limits stand in the script and in its header alike."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    limits = {part: int(seconds) for part, seconds in re.findall(r"\[(\w+)\]=(\d+)", script)}
    assert f"default_parts=({' '.join(PARTS)})" in script
    assert sum(limits[part] for part in PARTS) <= 9 * 60 - 30
    assert dict(re.findall(r"^#   (\w+) +(\d+) s  ", script, re.MULTILINE)) == {k: str(s) for k, s in limits.items()}


def test_the_part_ops_has_rows_of_every_op_and_of_every_constant(dry_run):
    rows = rows_of(dry_run[1], "ops")
    assert {row["group"] for row in rows} == {"copy", "matmul", "launch_shape", "roae", "rope_roae", "road"}
    on_a_cpu = [provider for provider in ROPE_ROAE if provider not in ("liger", "compiled")]
    found = {(row["provider"], row["mode"]) for row in rows if row["group"] == "rope_roae"}
    assert found == {(provider, mode) for provider in on_a_cpu for mode in (*MODES, "accuracy")}
    assert {row["provider"] for row in rows if row["group"] == "launch_shape"} == {AS_IT_IS, *CHANGES, "separate"}
    assert all(row["output_relative_l2"] < 1e-6 for row in rows if row["mode"] == "accuracy")


def test_the_part_layers_has_rows_of_block_and_layer(dry_run):
    assert {row["group"] for row in rows_of(dry_run[1], "layers")} >= {"attention", "decoder_layer"}


def test_the_part_training_has_rows_of_every_method(dry_run):
    rows = [row for row in rows_of(dry_run[1], "training") if row["group"] == "training_step"]
    assert {row["provider"] for row in rows} >= {method for method in METHODS if LIGER not in method}
    assert {row["steps"] for row in rows if row["provider"].startswith("RoSA")} == {40}, "a whole interval of DLS"
    trainable = {row["provider"]: row["trainable_parameters"] for row in rows}
    assert trainable["frozen floor"] == 0 and trainable["RoSA skip"] == trainable["RoSA mask"] > 0


def test_a_part_that_is_cut_short_or_fails_is_said_and_leaves_the_others_their_time(tmp_path):
    """What `decode` has beside the decoding alone is run: of that there is nothing in `mixed`."""
    options = "-k bench_machine --benchmark-max-time=0.01 --benchmark-min-rounds=1"
    done = gpu_script(tmp_path / "out", "training=1", "mixed", "decode=300", options=options)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "training: cut short at its limit of 1 s" in summary
    assert "mixed: FAILED with status 5 after" in summary and "decode: passed in" in summary
    assert {row["group"] for row in rows_of(tmp_path / "out", "decode")} == {"copy", "matmul"}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("speed", "unknown part 'speed'; parts: tests ops layers training decode host mixed"),
        ("ops=fast", "the limit of a part is a number of seconds, got 'ops=fast'"),
        ("ops=0", "the limit of a part is a number of seconds, got 'ops=0'"),
    ],
)
def test_the_script_refuses_other_parts_and_limits_before_it_does_anything(tmp_path, part, message):
    done = run("bash", "benchmarks/gpu.sh", tmp_path / "out", "layers", part)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("gigabytes", "preset"), [(141, "7b"), (80, "7b"), (40, "1.5b"), (24, "0.5b")])
def test_the_default_preset_is_the_largest_that_fits(gigabytes, preset):
    assert largest_that_fits(4096, gigabytes * 1e9) == preset


def test_presets_are_the_true_sizes():
    """Parameters from the models' cards, in billions, the embeddings counted once where they are tied."""
    for name, billions in (("0.5b", 0.494), ("1.5b", 1.544), ("7b", 7.616)):
        assert needed_bytes(PRESETS[name], 0) / 2e9 == pytest.approx(billions, rel=2e-3)
