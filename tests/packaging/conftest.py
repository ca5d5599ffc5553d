"""The distributions as they are built, and an environment that holds the wheel and what it requires: no extra."""

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "rosa", "rosa_kernels")


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it, of a copy of the sources."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    # Two processes of `build` share this one's setuptools: nothing is fetched.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def environment(distributions, tmp_path_factory):
    """The `bin` of a virtual environment with the wheel, and links to this one's packages that it requires."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, distributions[1]], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for name in _required_by(PathDistribution(next(packages.glob("rosa_peft-*.dist-info")))):
        _link(name, packages)
    return folder / "bin"


def _required_by(wheel):
    """The names of all that a distribution requires without an extra, and of what that requires in turn."""
    waiting, names = [(wheel, {""})], set()
    while waiting:
        found, extras = waiting.pop()
        for requirement in map(Requirement, found.requires or []):
            asked = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
            if asked and (requirement.name, *requirement.extras) not in names:
                names.add((requirement.name, *requirement.extras))
                waiting.append((distribution(requirement.name), requirement.extras or {""}))
    return {name for name, *_ in names}


def _link(name, packages):
    """Links to the files and folders of a distribution that stand in site-packages."""
    here = Path(sysconfig.get_path("purelib"))
    for top in {file.parts[0] for file in distribution(name).files} - {"..", "__pycache__"}:
        if not (packages / top).exists():
            (packages / top).symlink_to(here / top)
