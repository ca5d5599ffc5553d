"""README and the pages under docs/: what they link to and name is there, commands are ones that exist, code is code."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

from rosa.cli import COMMANDS
from rosa.training.finetune_arguments import TRAINING_DEFAULTS
from rosa.training.parsing import parse
from tests.rosa import command_line

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = ("rosa", "rosa_kernels", "tests", "benchmarks", "configs", "docs", "examples")
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    return FENCED.sub("", text_of(page))


def anchors(page):
    """What a heading is called in a link: as GitHub and MkDocs both call it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def commands(page):
    """The commands of a page, in blocks and in lines, each as one line without its comment."""
    blocks = "\n".join(block for language, block in FENCED.findall(text_of(page)) if language in ("", "bash"))
    starts = ("rosa ", "python ", "make ", "bash ")
    lines = [line.removeprefix("$ ") for line in blocks.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line.startswith(starts)]
    inline = re.findall(r"`((?:rosa|python -m|make|bash) [^`]+)`", prose(page))
    return [" ".join(line.partition(" #")[0].split()) for line in lines + inline]


@cache
def options(command):
    return set(re.findall(r"(?<![\w-])--[\w-]+", command_line.help_of(command)))


def test_the_readme_can_be_read_at_once():
    assert len(text_of(README)) < 9000


@each_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


@each_page
def test_files_that_are_named_are_there(page):
    missing = [name for name in NAMED.findall(text_of(page)) if not (ROOT / name).exists() and "results/" not in name]
    assert not missing


@each_page
def test_commands_are_ones_that_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        words = line.split()
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), line
        elif words[:2] == ["python", "-m"] and words[2].partition(".")[0] in FOLDERS:
            assert importlib.util.find_spec(words[2]), line
        elif words[0] == "rosa" and re.fullmatch("[a-z]+", words[1]):
            assert words[1] in COMMANDS, line
            given = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
            assert given <= options(words[1]) | {"--help"}, line
        for name in re.findall(r"(?<![\w/.])configs/[\w./-]+\.\w+", line):
            assert (ROOT / name).is_file(), line


@each_page
def test_python_is_python(page):
    for language, block in FENCED.findall(text_of(page)):
        if language == "python":
            ast.parse(block)


def test_the_table_of_defaults_is_what_a_run_takes():
    row = re.compile(r"^\| `--(\w+)`[^|]*\| (\S+) \| (\S+) \| (\S+) \|", re.MULTILINE)
    told = {name: values for name, *values in row.findall(text_of(ROOT / "docs" / "training.md"))}
    run = ["--model", "m", "--data", "d", "--output", "o", "--method"]
    sources = [parse([*run, "rosa"])[1], parse([*run, "road"])[1], TrainingArguments("o")]
    taken = {name: [getattr(source, name) for source in sources] for name in TRAINING_DEFAULTS}
    assert told.keys() == {name for name, values in taken.items() if values != values[-1:] * 3}
    for name, values in told.items():
        kind = type(taken[name][0])
        assert [kind(value) for value in values] == taken[name], name


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="argparse prints help otherwise in other versions of Python"
)
def test_the_page_of_commands_is_what_they_print():
    assert text_of(command_line.PAGE) == command_line.page(), "run python -m tests.rosa.command_line"


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme, about versions to come
    built = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "RoPE-aware Selective Adaptation" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
