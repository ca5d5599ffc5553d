#!/usr/bin/env bash
# On a machine with a GPU: the tests with the compiled kernels, then the benchmarks. Logs and results go to the folder
# given (default: gpu_results). Uses the python that PYTHON names, with the packages that it has.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-gpu_results}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
"$python" -m rosa info | tee "$out/info.txt"
"$python" -m pytest tests/rosa_kernels tests/rosa/test_equations.py -q 2>&1 | tee "$out/tests.txt"
tests=$?
"$python" -m pytest benchmarks -q 2>&1 | tee "$out/benchmarks.txt"
benchmarks=$?
cp -r benchmarks/results/. "$out/"
exit $((tests || benchmarks))
