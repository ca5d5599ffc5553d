"""Imports between the wings of the package point one way, and those inside a wing in no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import rosa

ROOT = Path(rosa.__file__).parent

# From the floor up: each may import those before it. "rosa" is what the package shows to its users.
WINGS = (
    "errors", "storage", "models", "adapters", "composition", "selection", "data", "training", "rosa", "evaluation",
    "miniature", "inspection", "comparison", "demo", "commands", "cli",
)  # fmt: skip


def imports(file: Path) -> set[str]:
    """The names, from `rosa.` on, of the modules that a file imports anywhere in it; of `rosa` itself, "rosa"."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names if module.startswith("rosa.")}
    return {name.removeprefix("rosa.") for name in names if name == "rosa" or name.startswith((".", "rosa."))}


def test_every_file_stands_in_a_wing():
    at_the_top = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert at_the_top | {"rosa"} == {*WINGS, "__init__", "__main__"}


def test_imports_between_wings_point_one_way():
    wrong = []
    for number, wing in enumerate(WINGS):
        below = set(WINGS[: number + 1])
        for file in [ROOT / f"{wing}.py", *(ROOT / wing).rglob("*.py")]:
            if file.exists():
                wrong += [f"{file.relative_to(ROOT)}: {n}" for n in imports(file) if n.split(".")[0] not in below]
    assert not wrong


def test_no_file_imports_itself_by_way_of_others_not_even_when_a_function_runs():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("*/**/*.py")}
    graph = {name: imports(path) & files.keys() for name, path in files.items()}
    assert {"adapters.record", "adapters.saving"} <= graph["adapters.save_pretrained"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
