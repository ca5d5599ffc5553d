"""A process with the compiler, which runs one Python program after another: it imports Triton once, and compiles and
disassembles what programs share once.

It reads programs from its standard input and answers each on its standard output with what the program printed, or with
the traceback that ended it; all as lines of JSON. Modules are those of the programs before: what one changes in them it
changes back.
"""

import contextlib
import io
import json
import sys
import traceback


def run(program: str, arguments: list[str]) -> dict[str, str]:
    printed, sys.argv[1:] = io.StringIO(), arguments
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "<program>", "exec"), {"__name__": "__program__"})
    except Exception:
        return {"error": traceback.format_exc()}
    return {"printed": printed.getvalue()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
