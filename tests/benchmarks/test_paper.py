"""docs/paper.md: its tables are what the program makes, and what it says of runs and of peft is so."""

import importlib.util
import json
import os
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import paper, paper_counts, paper_printed, quantized
from benchmarks.document import fill
from benchmarks.results import COUNTED, read
from rosa.evaluation.tasks import TASKS
from rosa.training.memory import LOADED
from rosa.training.methods import BASELINES, attach
from tests.conftest import HAS_GPU
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer
from tests.scale.conftest import launch

ROWS = [{"instruction": f"Add {i} and {i}.", "output": str(2 * i)} for i in range(24)]
in_the_interpreter = pytest.mark.skipif(HAS_GPU, reason="what the kernels save is counted as on the CPU")


@pytest.fixture(autouse=True)
def _environment():
    """Counts what the kernels save; and takes back CC and CXX, which peft leaves set where BOFT's extension does not
    compile, and with which DeepSpeed would compile its own anew."""
    with patch.dict(os.environ, {"ROSA_BACKEND": "triton"}):
        yield


def tiny():
    """A base in bfloat16, and its tokenizer."""
    tokenizer = tiny_tokenizer([row["instruction"] + row["output"] for row in ROWS], vocab_size=300)
    return tiny_model(len(tokenizer)).bfloat16(), tokenizer


@in_the_interpreter
def test_the_document_has_the_tables_that_the_program_makes():
    text = paper.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, paper.tables()), "run `python -m benchmarks.paper`"


@in_the_interpreter
def test_the_document_of_quantized_bases_has_the_table_that_its_program_makes():
    text = quantized.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, quantized.tables()), "run `python -m benchmarks.quantized`"


@in_the_interpreter
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("load_in", LOADED)
def test_one_row_more_of_a_quantized_base_would_not_fit(load_in, checkpoints):
    name, room = "Qwen2.5-7B", paper.CARD - paper.CONTEXT - quantized.state("Qwen2.5-7B", load_in)
    most = quantized.most_rows(name, load_in, quantized.LONGEST, checkpoints=checkpoints)
    fits, too_much = (
        quantized.activations(name, load_in, rows, quantized.LONGEST, checkpoints=checkpoints)
        for rows in (most, most + 1)
    )
    assert fits <= room < too_much


def test_the_shares_are_the_papers_but_for_a_thousandth_of_two():
    counted = {
        (method, name): round(value, 3)
        for method, row in paper_printed.shares().items()
        for name, value in zip(paper.MODELS, row, strict=True)
    }
    printed = paper_printed.printed_shares()
    assert len(printed) == 27
    other = {key: (counted[key], figure) for key, figure in printed.items() if counted[key] != figure}
    assert other == {("DoRA", "Qwen2.5-7B"): (0.545, 0.546), ("BONE", "Llama-3.1-8B"): (0.273, 0.274)}


def test_the_shares_of_the_papers_text_are_not_those_of_its_tables():
    counted, printed = paper_printed.shares(), paper_printed.printed_shares()
    for number, name in enumerate(("Qwen2.5-7B", "Llama-3.1-8B", "Gemma-2-9B")):
        assert counted["AdaLoRA, as written"][number] > 2.6 * printed["AdaLoRA", name]
    assert round(counted["LN tuning, as written"][0], 3) == 0.003 != printed["LN tuning", "Qwen2.5-7B"]


def test_of_qwen2_peft_tunes_one_norm_a_layer():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(paper.MODELS["Qwen2.5-0.5B"])
    attach(model, "ln_tuning", settings={"target_modules": None})
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"post_attention_layernorm"}


@pytest.mark.parametrize("name", paper_printed.ACCURACIES.values())
def test_the_papers_micro_averages_are_those_of_its_accuracies(name):
    found = paper_printed.differences(name)
    assert found and all(abs(value) <= paper_printed.ROUNDING for value in found.values())


def test_what_two_tables_print_is_the_same():
    one, two, three, four = (
        paper_printed.printed(name).figures
        for name in ("table1_commonsense", "table2_model_sizes", "table3_arithmetic", "table4_ablations")
    )
    for method in ("RoSA", "AdaLoRA", "C3A"):
        assert one["Qwen2.5-7B", method]["micro-average"] == two["Qwen2.5-7B", method]["micro-average"]
    for (model, method), row in three.items():
        assert row["trainable"] == one[model, method]["trainable"]
    assert four["Qwen2.5-7B", "RoSA"]["micro-average"] == one["Qwen2.5-7B", "RoSA"]["micro-average"]
    every_layer = [four["Qwen2.5-7B", name]["micro-average"] for name in ("RoAE only", "RoSA, k_ratio 1")]
    assert every_layer[0] == every_layer[1]


def test_the_rows_of_the_benchmarks_are_those_that_the_tasks_check():
    known = {name: task.hub.rows for name, task in TASKS.items() if task.hub is not None}
    assert paper_printed.ROWS.keys() == TASKS.keys()
    assert {name: paper_printed.ROWS[name] for name in known} == known


@pytest.mark.parametrize("method", ["RoSA", "LoRA", "AdaLoRA", "LN tuning, as written"])
def test_two_layers_tell_what_all_layers_have(method):
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(paper.MODELS["Qwen2.5-0.5B"], dtype=torch.bfloat16)
        job = paper.methods()[method]
        attach(whole, job.method, settings=job.peft_settings)
    found = paper.sizes("Qwen2.5-0.5B", method)
    parameters = list(whole.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert found == (
        sum(p.numel() for p in trained),
        sum(p.numel() for p in parameters),
        sum(p.nbytes for p in parameters) - sum(p.nbytes for p in trained),
        sum(p.nbytes for p in trained),
    )


@in_the_interpreter
def test_saved_bytes_are_those_that_were_counted():
    counted = {row["provider"]: row["saved_per_token"] for row in read(COUNTED).rows}
    a_token = {frozen: paper.saved("Qwen2.5-7B", "RoSA", 1, 32, frozen=frozen) / 32 for frozen in (False, True)}
    assert a_token == {False: counted["RoSA"], True: counted["RoSA, frozen by DLS"]}


def test_the_most_tokens_just_fit():
    for checkpoints in (False, True):
        most = paper.most_tokens("Qwen2.5-0.5B", "LoRA", checkpoints=checkpoints)
        rows = most // paper.LENGTH
        fewer, more = (
            paper.needed("Qwen2.5-0.5B", "LoRA", n, paper.LENGTH, checkpoints=checkpoints) for n in (rows, rows + 1)
        )
        assert fewer <= paper.CARD - paper.CONTEXT < more


@pytest.mark.parametrize("method", BASELINES)
def test_adapters_of_peft_are_in_float32(method):
    settings = {"c3a": {"block_size": 16}}.get(method)
    model = attach(tiny()[0], method, settings=settings)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_step_of_ln_tuning_on_a_weight_of_1_does_not_round_away():
    model = attach(tiny()[0], "ln_tuning")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all((p != 1).all() for p in trained)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
def test_two_processes_train_with_the_papers_protocol_under_zero_1(tmp_path, monkeypatch):
    monkeypatch.delenv("ROSA_BACKEND")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for part in tiny():
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    files = ["--model", tmp_path / "base", "--data", tmp_path / "rows.json", "--output", tmp_path / "out"]
    config = [
        "--config",
        paper_counts.CONFIGS / "commonsense15k.yaml",
        "--deepspeed",
        paper_counts.CONFIGS / "zero1.json",
    ]
    # At 0.03 eight steps lower the loss.
    short = "--val_size 4 --max_steps 8 --eval_steps 4 --save_steps 4 --dls_interval 4 --learning_rate 0.03"
    status, output = launch("torchrun", "rosa", "train", *config, *files, *short.split(), "--use_cpu", "true")
    assert status == 0, output[-4000:]
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert sum("dls/layers" in entry for entry in log) == 2
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.bfloat16}
    assert any(name.endswith("up") and value.any() for name, value in adapter.items())
