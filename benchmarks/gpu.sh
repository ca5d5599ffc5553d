#!/usr/bin/env bash
# On a machine with a GPU: the tests with the compiled kernels, then the benchmarks, within 9 minutes on an H200 or H100.
#
#   bash benchmarks/gpu.sh OUTDIR [part[=seconds]...]     without parts, all of them but mixed
#
# OUTDIR gets summary.txt, log.txt and the rows of each benchmark part (..._ops.json, ...), 8 files at most. Rows are
# written as they come: a part that is cut short keeps those that it has. The exit status is 0 if all passed.
#
# Time, planned for an H200; each part has its limit, so that one that hangs leaves the others theirs. `layers=200` gives
# a part another limit, as for a slower GPU. With half a minute for what is between the parts:
#   tests     100 s  the tests that need a GPU (three quarters of it at most), then the kernels' other tests
#   ops       135 s  one constant of roae's launches changed at a time; roae and rope_roae, three models, three numbers
#                    of tokens; `compiled` and road at Qwen2.5-7B's shape only
#   layers     65 s  attention block and decoder layer; `compiled` once: the decoder layer of Qwen2.5-7B, 2 x 2048 tokens
#   training  145 s  all methods, the largest model that fits
#   decode     40 s  one token at a time
#   host       25 s  what launches cost the host; a log and no rows
#   mixed     300 s  eight requests with eight adapters, six ways; only where it is asked for
# `compiled` is kept this small because torch.compile takes tens of seconds a shape; `pytest benchmarks` runs it all.
#
# Uses the python that PYTHON names (python3) with the packages that it has, and no network. COMMIT names the commit
# where the tree comes without its history; PYTEST_ADDOPTS adds options of pytest's. Without a GPU it runs too, at small
# sizes.
set -uo pipefail
default_parts=(tests ops layers training decode host)
all_parts=("${default_parts[@]}" mixed)
declare -A limits=([tests]=100 [ops]=135 [layers]=65 [training]=145 [decode]=40 [host]=25 [mixed]=300) # seconds
if [ $# -eq 0 ]; then
    echo "usage: bash benchmarks/gpu.sh OUTDIR [part[=seconds]...], parts: ${all_parts[*]}" >&2
    exit 2
fi
parts=()
for argument in "${@:2}"; do
    part=${argument%%=*}
    if [[ " ${all_parts[*]} " != *" $part "* ]]; then
        echo "unknown part '$part'; parts: ${all_parts[*]}" >&2
        exit 2
    fi
    if [[ $argument == *=* ]]; then
        limits[$part]=${argument#*=}
        if [[ ! ${limits[$part]} =~ ^[1-9][0-9]*$ ]]; then
            echo "the limit of a part is a number of seconds, got '$argument'" >&2
            exit 2
        fi
    fi
    parts+=("$part")
done
[ ${#parts[@]} -gt 0 ] || parts=("${default_parts[@]}")

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

# limited PART SECONDS ARGUMENTS...: pytest under a limit, its output added to the log. An interrupt lets pytest end
# with its summary.
limited() {
    local part=$1 seconds=$2 began=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=10 "$seconds" "$python" -m pytest -q -p no:cacheprovider "$@" 2>&1 |
        tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
    case $status in
        0) say "$part: passed in $((SECONDS - began)) s" ;;
        124 | 137) say "$part: cut short at its limit of $seconds s" && failed=1 ;;
        *) say "$part: FAILED with status $status after $((SECONDS - began)) s, see log.txt" && failed=1 ;;
    esac
}

# benchmarks PART ARGUMENTS...: benchmarks under the part's limit, their rows in the part's file.
benchmarks() {
    limited "$1" "${limits[$1]}" "${@:2}" --results "$out/${stamp}_$1.json"
}

tests() {
    local began=$SECONDS options=(--continue-on-collection-errors) rest
    has xdist && options+=(--numprocesses auto --maxprocesses 12) # mostly compiling kernels
    limited tests $(((limits[tests] * 3 + 3) / 4)) tests -m gpu "${options[@]}"
    rest=$((began + limits[tests] - SECONDS))
    limited tests $((rest > 10 ? rest : 10)) tests/rosa_kernels -m "not gpu" "${options[@]}"
}
ops() {
    benchmarks ops benchmarks/bench_{machine,launch_shape,roae,rope_roae,road}.py \
        -k "not ((compiled or bench_road) and (Llama or Gemma))"
}
layers() {
    benchmarks layers benchmarks/bench_{machine,attention,decoder_layer}.py \
        -k "not compiled or (bench_decoder_layer and Qwen2 and 2x2048)"
}
training() { benchmarks training benchmarks/bench_{machine,training_step}.py; }
decode() { benchmarks decode benchmarks/bench_{machine,decode}.py; }
host() { benchmarks host benchmarks/bench_host.py; }
mixed() { benchmarks mixed benchmarks/bench_mixed_batch.py; }

: >"$out/summary.txt" >"$out/log.txt"
"$python" -m rosa info 2>&1 | tee -a "$out/summary.txt"
has_gpu || say "no GPU here: small sizes, on the CPU, whose times say nothing about a GPU"
has liger_kernel || say "liger-kernel is not installed: its rows are left out"
has hypothesis || say "hypothesis is not installed: the test files that need it cannot run"
for part in "${parts[@]}"; do
    echo "== $part" >>"$out/log.txt"
    "$part"
done
rows=("$out/$stamp"_*.json)
if [ -e "${rows[0]}" ]; then
    "$python" -m benchmarks.report --print "${rows[@]}" 2>&1 | tee -a "$out/summary.txt" || failed=1
    has_gpu && say "To keep these results: copy the .json files to a folder benchmarks/results/<GPU>/ of the repository," \
        "and run python -m benchmarks.report there."
fi
exit $failed
