#!/usr/bin/env bash
# On a machine with a GPU: the tests with the compiled kernels, then the benchmarks, within 8 minutes on an H200.
#
#   bash benchmarks/gpu.sh OUTDIR [part...]     parts: tests ops layers training; without any, all of these; and mixed
#
# OUTDIR gets summary.txt, a log of each part (tests.txt, ...) and the rows of each benchmark part (..._ops.json, ...),
# 8 files at most. Rows are written as they come: a part that is cut short keeps those that it has.
#
# Time, planned for an H200; each part has its limit, so that one that hangs leaves the others theirs:
#   tests     120 s  the tests that need a GPU (90 s at most), then the kernels' other tests
#   ops       135 s  rope_roae, road and roae, three models, three numbers of tokens; `compiled` at Qwen2.5-7B's shape only;
#                    the shapes of roae's launches
#   layers     85 s  attention block and decoder layer; `compiled` once: the decoder layer of Qwen2.5-7B, 2 x 2048 tokens
#   training  125 s  nine methods, the largest model that fits
#   mixed     300 s  eight requests with eight adapters, six ways; only where it is asked for
# `compiled` is kept this small because torch.compile takes tens of seconds a shape; `pytest benchmarks` runs it all.
#
# Uses the python that PYTHON names (python3) with the packages that it has, and no network. COMMIT names the commit
# where the tree comes without its history. Without a GPU it runs too, at small sizes.
set -uo pipefail
default_parts=(tests ops layers training)
all_parts=("${default_parts[@]}" mixed)
if [ $# -eq 0 ]; then
    echo "usage: bash benchmarks/gpu.sh OUTDIR [part...], parts: ${all_parts[*]}" >&2
    exit 2
fi
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=("${default_parts[@]}")
for part in "${parts[@]}"; do
    if [[ " ${all_parts[*]} " != *" $part "* ]]; then
        echo "unknown part '$part'; parts: ${all_parts[*]}" >&2
        exit 2
    fi
done

mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
stamp=$(date +%Y-%m-%d_%H%M%S)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=0

say() { echo "$*" | tee -a "$out/summary.txt"; }
has() { "$python" -c "import $1" 2>/dev/null; }
has_gpu() { "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; }

# limited PART SECONDS ARGUMENTS...: pytest under a limit, its output added to the part's log. An interrupt lets pytest
# end with its summary.
limited() {
    local part=$1 seconds=$2 began=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=10 "$seconds" "$python" -m pytest -p no:cacheprovider "$@" 2>&1 |
        tee -a "$out/$part.txt"
    status=${PIPESTATUS[0]}
    case $status in
        0) say "$part: passed in $((SECONDS - began)) s" ;;
        124 | 137) say "$part: cut short at its limit of $seconds s" && failed=1 ;;
        *) say "$part: FAILED with status $status after $((SECONDS - began)) s, see $part.txt" && failed=1 ;;
    esac
}

tests() {
    local began=$SECONDS workers=()
    has xdist && workers=(--numprocesses auto --maxprocesses 12) # mostly compiling kernels
    limited tests 90 tests -q -m gpu --continue-on-collection-errors "${workers[@]}"
    # At least 20 s: the first ends within 100 s, 10 of them to be killed in.
    limited tests $((began + 120 - SECONDS)) tests/rosa_kernels -q -m "not gpu" --continue-on-collection-errors \
        "${workers[@]}"
}
ops() {
    limited ops 135 benchmarks/bench_{machine,rope_roae,road,launch_shape,roae}.py -q --results "$out/${stamp}_ops.json" \
        -k "not (compiled and (Llama or Gemma))"
}
layers() {
    limited layers 85 benchmarks/bench_{machine,attention,decoder_layer}.py -q --results "$out/${stamp}_layers.json" \
        -k "not compiled or (bench_decoder_layer and Qwen2 and 2x2048)"
}
training() {
    limited training 125 benchmarks/bench_{machine,training_step}.py -q --results "$out/${stamp}_training.json"
}
mixed() {
    limited mixed 300 benchmarks/bench_mixed_batch.py -q --results "$out/${stamp}_mixed.json"
}

: >"$out/summary.txt"
"$python" -m rosa info 2>&1 | tee -a "$out/summary.txt"
has_gpu || say "no GPU here: small sizes, on the CPU, whose times say nothing about a GPU"
has liger_kernel || say "liger-kernel is not installed: its RoPE is left out"
has hypothesis || say "hypothesis is not installed: the test files that need it cannot run"
for part in "${parts[@]}"; do
    : >"$out/$part.txt"
    "$part"
done
rows=("$out/$stamp"_*.json)
if [ -e "${rows[0]}" ]; then
    "$python" -m benchmarks.report --print "${rows[@]}" 2>&1 | tee -a "$out/summary.txt"
    has_gpu && say "To keep these results: copy the .json files to a folder benchmarks/results/<GPU>/ of the repository," \
        "and run python -m benchmarks.report there."
fi
exit $failed
