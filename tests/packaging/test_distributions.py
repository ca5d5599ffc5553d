"""The sdist and the wheel: what they hold, and that the wheel works away from the checkout, with no extra installed."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import rosa

from .conftest import ROOT

COMMANDS = {
    "train": ["--model", "base", "--data", "rows.json", "--output", "out"],
    "compare": ["--config", "comparison.yaml"],
    "inspect": ["--run", "out"],
    "evaluate": ["--model", "base", "--tasks", "gsm8k"],
    "demo": ["--quick"],
}
NEEDED = {
    "train": "accelerate",
    "compare": "scipy",
    "inspect": "matplotlib",
    "evaluate": "datasets",
    "demo": "matplotlib",
}


def run(environment, program, *arguments, **variables):
    """A program of the environment, in a folder without the checkout; its result, with stderr in stdout."""
    return subprocess.run(
        [environment / program, *arguments],
        cwd=environment,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def modules(package):
    return {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}


def test_the_wheel_holds_both_packages_their_types_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == modules("rosa") | modules("rosa_kernels") | {"rosa/py.typed", "rosa_kernels/py.typed"}


def test_the_sdist_holds_what_the_wheel_is_built_from(distributions):
    with tarfile.open(distributions[0]) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules("rosa") | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= files
    assert not any(name.startswith(("tests", "docs", "benchmarks", "runs")) for name in files)


def test_the_metadata_has_the_packages_version_licence_and_extras(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == rosa.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    extras = {"train", "examples", "deepspeed", "quant", "bench", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    asked = {line.partition(";")[0].strip() for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {re.split(r"\W+", line)[0] for line in asked} == {
        "torch", "triton", "transformers", "safetensors", "huggingface_hub", "filelock",
    }  # fmt: skip


def test_the_command_runs_without_any_extra(environment):
    told = run(environment, "rosa", "info")
    assert told.returncode == 0, told.stdout
    assert re.search(rf"^rosa +{re.escape(rosa.__version__)}$", told.stdout, re.MULTILINE)
    assert re.search(r"^peft +not installed$", told.stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def seen(environment):
    """What one process of that environment saw: by command its exit status and its error, and what was imported."""
    told = run(environment, "python", Path(__file__).with_name("without_extras.py"), json.dumps(COMMANDS))
    assert told.returncode == 0, told.stdout
    return json.loads(told.stdout.splitlines()[-1])


def test_every_name_and_all_modules_import_but_those_of_the_extras(seen, environment):
    assert seen["file"].startswith(str(environment.parent))
    assert seen["names"] == sorted(rosa.__all__)
    needing = (
        "rosa.comparison", "rosa.inspection", "rosa.commands.inspect", "rosa.demo",
        "rosa.training.adalora", "rosa.training.ln_tuning",
    )  # fmt: skip
    assert [name for name in seen["failed"] if not name.startswith(needing)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_the_extra_that_it_needs(seen, command):
    status, error = seen["commands"][command]
    assert status == 1
    (line,) = error.splitlines()
    assert line.startswith(f"rosa {command}: error: ") and NEEDED[command] in line
    assert line.endswith("; install the extra: pip install '.[train]' in RoSA's folder")


def test_the_commands_help_needs_no_library():
    """`rosa --help` and a command that there is not are answered before torch is imported."""
    script = "import sys\nfrom rosa.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "rosa.cli" in told.stdout and "'torch'" not in told.stdout
