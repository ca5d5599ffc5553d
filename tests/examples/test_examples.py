"""The scripts in examples/, run as a user runs them: a base model and rows in, an adapter out."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rosa

from ..rosa.tiny_qwen2 import tiny_model, tiny_tokenizer
from ..scale.conftest import launch

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {  # of what they print: that one of the two layers was selected; or of RoAd, that it loads again
    "pytorch_loop.py": r"layers \(\d,\)",
    "accelerate_loop.py": r"layers \(\d,\)",
    "rosa_trainer.py": r"'dls/layers': 1",
    "road.py": r"adapter saved in .*, and loaded again: default",
    "trl_sft.py": r"layers \(\d,\)",
}
LOSS = re.compile(r"(?<!_)\bloss'?:? '?(\d+\.\d+)")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny base model and `rows.json`: 42 steps of two processes; after 40 layers are selected."""
    folder = tmp_path_factory.mktemp("base")
    rows = [{"instruction": f"Say {i % 16}.", "output": f"It is {i % 16}."} for i in range(224)]
    (folder / "rows.json").write_text(json.dumps(rows))
    tokenizer = tiny_tokenizer(row["instruction"] + row["output"] for row in rows)
    tokenizer.save_pretrained(folder)
    tiny_model(len(tokenizer), initializer_range=0.3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", EXPECTED)
def test_an_example_trains_an_adapter(script, base, tmp_path, monkeypatch, capfd):
    arguments = ["--model", str(base), "--data", str(base / "rows.json"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    check(capfd.readouterr().out, EXPECTED[script], base, tmp_path / "out")


@pytest.mark.parametrize("script, zero_stage", [("trl_sft.py", None), ("accelerate_loop.py", "2")])
def test_an_example_runs_in_two_processes_as_it_is(script, zero_stage, base, tmp_path, monkeypatch):
    environment = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    if zero_stage:  # as `accelerate launch` says it
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": zero_stage}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = ("--model", base, "--data", base / "rows.json", "--output", tmp_path / "out")
    status, output = launch("torchrun", EXAMPLES / script, *arguments)
    assert status == 0, output[-4000:]
    assert output.count("adapter saved in") == 1  # or each process would have trained alone
    check(output, EXPECTED[script], base, tmp_path / "out")


def check(printed, expected, base, adapter):
    """The loss fell, what was expected was printed, and the adapter loads and has an effect."""
    losses = [float(loss) for loss in LOSS.findall(printed)]
    assert len(losses) >= 4 and losses[-1] < losses[0] - 0.1
    assert re.search(expected, printed)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 12)[None]
    before = model(ids).logits
    assert not torch.allclose(rosa.load_adapter(model, adapter)(ids).logits, before, atol=1e-2)
