#!/usr/bin/env bash
# Installs the extras one by one, each into a virtual environment of its own, and imports what it enables. Downloads, and
# takes minutes: run by hand, `make extras`, or `bash tests/packaging/extras.sh train quant` for some of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

enables() {
    case $1 in
        train) echo "import accelerate, datasets, peft, matplotlib, scipy, rosa.comparison.report, rosa.demo.run, rosa.inspection.figures; rosa.RosaTrainer" ;;
        examples) echo "import trl; from trl import SFTTrainer" ;;
        deepspeed) echo "import deepspeed; deepspeed.zero.GatheredParameters" ;;
        quant) echo "import bitsandbytes, torchao; from transformers import BitsAndBytesConfig, TorchAoConfig" ;;
        bench) echo "import liger_kernel, pytest_benchmark, benchmarks.static" ;;
        docs) echo "import material, mkdocs" ;;
        dev) echo "import build, hypothesis, mypy, pytest, tensorboard, xdist" ;;
        *) echo "extras.sh: there is no extra $1" >&2 && return 1 ;;
    esac
}

for extra in "${@:-train examples deepspeed quant bench docs dev}"; do
    for name in $extra; do
        script=$(enables "$name")
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        "$python" -m venv "$folder"
        install="$folder/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt"
        $install torch==2.13.0 # first and pinned, so that nothing below brings another build of it
        $install ".[$name]"
        "$folder/bin/python" -c "import rosa; $script"
        "$folder/bin/rosa" info
        echo "extra $name: installed, $(du -sh "$folder" | cut -f1), and imports"
        rm -rf "$folder"
    done
done
