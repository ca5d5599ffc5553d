"""Run in an environment without extras: which names and modules import, and what each command says. A line of JSON."""

import importlib
import json
import pkgutil
import sys
from contextlib import redirect_stderr
from io import StringIO

import rosa
import rosa_kernels
from rosa.cli import main


def say(command, arguments):
    with redirect_stderr(StringIO()) as error:
        try:
            main([command, *arguments])
        except SystemExit as end:
            return end.code, error.getvalue()
    return 0, error.getvalue()


def fails(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return True
    return False


if __name__ == "__main__":
    commands = {command: say(command, arguments) for command, arguments in json.loads(sys.argv[1]).items()}
    names = [
        module.name
        for package in (rosa, rosa_kernels)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if module.name != "rosa.__main__"
    ]
    seen = {
        "file": rosa.__file__,
        "names": sorted(name for name in rosa.__all__ if getattr(rosa, name)),
        "failed": [name for name in names if fails(name)],
        "commands": commands,
    }
    print(json.dumps(seen))
