"""The command `rosa`, on a tiny real model: training, its errors, interruption, generation."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import rosa
from rosa.cli import COMMANDS, main
from rosa.commands.info import PACKAGES
from rosa.data.prompts import prompt
from rosa.data.rows import load_rows
from rosa.data.tokens import tokenize
from rosa.evaluation.generation import answer
from rosa.training.parsing import parse

from .tiny_qwen2 import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
REAL_DATA = ROOT.parent / "shared" / "data"
WORDS = (
    "apple",
    "river",
    "stone",
    "cloud",
    "tiger",
    "window",
    "garden",
    "bottle",
    "hammer",
    "pencil",
    "rocket",
    "silver",
)
# What the base model has learnt, and what it is to learn: the first wording for the second kind of task.
KNOWN = [{"instruction": f"Repeat the word {word}.", "output": f"the word is {word}"} for word in WORDS]
KNOWN += [{"instruction": f"Say the word {word}.", "output": f"I say {word} again"} for word in WORDS]
ROWS = [{"instruction": f"Say the word {word}.", "output": f"the word is {word}"} for word in WORDS]

needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "benchmarks").is_dir(), reason=f"the real data is not at ../{REAL_DATA.relative_to(ROOT.parent)}"
)


def pretrained(folder, rows, *, steps, vocab_size):
    """Saves a base model that has learnt the rows from scratch."""
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = tiny_tokenizer((prompt(row["instruction"]) + row["output"] for row in rows), vocab_size=vocab_size)
    examples = [dict(example) for example in tokenize(rows, tokenizer)]
    model = tiny_model(len(tokenizer))
    collate = DataCollatorForSeq2Seq(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(**collate(draw.sample(examples, 8))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    return pretrained(folder, KNOWN, steps=200, vocab_size=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(ROWS * 4))
    return file


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """A finished run of 24 steps with checkpoints at 8, 16 and 24. Copy it before changing it."""
    output = tmp_path_factory.mktemp("trained") / "output"
    main(train_args(base, data, output))
    return output


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def train_args(base, data, output, *more):
    """Short and brisk: `more` comes last, so it wins."""
    steps = "--max_steps 24 --save-steps 8 --logging_steps 2 --learning-rate 2e-2 --disable_tqdm true"
    common = ["--model", str(base), "--data", str(data), "--output", str(output)]
    selection = [] if {"--dls", "--method"} & set(more) else ["--dls_interval", "5"]
    return ["train", *common, *steps.split(), *selection, *map(str, more)]


def command(args):
    """The command line and environment of a fresh `python -m rosa`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return {"args": [sys.executable, "-m", "rosa", *map(str, args)], "cwd": ROOT, "env": environment}


def run(*args):
    return subprocess.run(**command(args), capture_output=True, text=True, timeout=120)


def error_of(args, capsys, code=1):
    """Runs a command that must fail, and returns its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert exit.value.code == code
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def losses(output):
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def load(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        rosa.load_adapter(model, adapter)
    return model, AutoTokenizer.from_pretrained(base)


# The command itself


def test_help_names_the_commands_without_importing_transformers_trainer():
    code = "import sys, rosa.cli\ntry: rosa.cli.main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    result = subprocess.run(**{**command([]), "args": [sys.executable, "-c", code]}, capture_output=True, text=True)
    assert all(f"\n    {name} " in result.stdout for name in COMMANDS)
    assert not {"transformers.trainer", "datasets", "accelerate"} & set(result.stderr.split())


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, f"rosa {rosa.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert f"usage: rosa {name}" in capsys.readouterr().out


def test_the_help_of_train_says_each_option_once_with_the_default_that_it_has(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "--train-norms" not in text and "(default: None)" not in text
    assert re.search(r"^  --no_train_norms +the same as --train_norms false$", text, re.MULTILINE)
    assert re.search(r"^  --rank RANK +inner size of the low-rank projections \(default: 128\)$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "rosa: error: the following arguments are required: COMMAND"),
        (["trian"], "rosa: error: argument COMMAND: invalid choice: 'trian'"),
        (["train", "--model", "m", "--data", "d"], "rosa train: error: the following arguments are required: --output"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--rnak", "4"], "unrecognized arguments: --rnak 4"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--rank", "x"], "argument --rank: invalid int"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--dls_mode", "x"], "argument --dls_mode.*invalid"),
        (["train", "--model", "m", "--data", "d", "--output", "o", "--resume_from_checkpoint", "c"], "--resume takes"),
        (["generate", "--model", "m"], "one of the arguments --instruction --prompt --data is required"),
        (["generate", "--model", "m", "--prompt", "p", "--input", "i"], "--input: only allowed with argument --i"),
        (["generate", "--model", "m", "--prompt", "p", "--adapters", "a"], "--adapters: only allowed with argument -"),
        (["generate", "--model", "m", "--prompt", "p", "--output", "o"], "--output: only allowed with argument --data"),
        (["generate", "--model", "m", "--data", "d", "--adapters", "x/a,y/a"], "x/a and y/a are both called a: "),
        (["generate", "--model", "m", "--data", "d", "--adapters", "a,,b"], "must be folders or Hub names, or NAME=FO"),
        (["generate", "--model", "m", "--data", "d", "--adapters", "a", "--adapter", "b"], "not allowed with argument"),
        (["generate", "--model", "m", "--prompt", "p", "--dtype", "float31"], "argument --dtype: invalid choice"),
        (["generate", "--model", "m", "--data", "d", "--batch_size", "0"], "--batch-size: must be at least 1, got 0$"),
        (["info", "--verbose"], "rosa info: error: unrecognized arguments: --verbose"),
    ],
)
def test_wrong_arguments_are_named(args, message, capsys):
    assert re.search(message, error_of(args, capsys, code=2))


def test_info_shows_versions_gpu_backends_and_environment(capsys, monkeypatch):
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    main(["info"])
    text = capsys.readouterr().out
    assert re.search("^adapters +RoSA, RoAd$", text, re.MULTILINE)
    for name in ("rosa", "Python", *PACKAGES):
        assert re.search(rf"^{name} +(\d+\.\d+|not installed)", text, re.MULTILINE)
    assert re.search(r"^GPU +" + (".* GiB, sm_" if torch.cuda.is_available() else "no GPU"), text, re.MULTILINE)
    assert re.search("^backends .*reference", text, re.MULTILINE)
    assert "ROSA_BACKEND=reference\n" in text


def test_kernels_refuses_an_unknown_gpu(capsys):
    assert "rosa kernels: error: arch must be among sm_80" in error_of(["kernels", "--arch", "sm_12"], capsys)


# Training


def test_train_learns_and_saves_adapter_and_tokenizer(base, data, tmp_path):
    result = run(*train_args(base, data, tmp_path / "output", "--val_size", 8, "--num-train-epochs", 1))
    assert result.returncode == 0, result.stderr
    assert "trainable params: " in result.stdout
    assert re.search(r"^24/24  loss .* tok/s  layers 1/2  0:00 left$", result.stdout, re.MULTILINE)
    assert "24/24  held-out loss " in result.stdout
    assert "Traceback" not in result.stderr
    falling = losses(tmp_path / "output")
    assert sum(falling[-3:]) < 0.5 * sum(falling[:3])
    assert (tmp_path / "output" / "tokenizer.json").is_file()
    assert not (tmp_path / "output" / "checkpoint-24" / "model.safetensors").exists()


def test_tuned_model_answers_in_the_form_of_the_data(base, trained):
    prompts = [prompt(row["instruction"]) for row in ROWS]
    before, after = (answer(*load(base, adapter), prompts, max_new_tokens=12) for adapter in (None, trained))
    assert not any(text.startswith("the word is ") for text in before)
    assert all(text.startswith("the word is ") for text in after)


def test_defaults_are_the_papers(base, data, tmp_path):
    main(["train", "--model", str(base), "--data", str(data), "--output", str(tmp_path), "--max_steps", "1"])
    args = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs) == (1e-3, "cosine", 3)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 2)
    assert args.get_warmup_steps(1000) == 50
    assert args.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))
    config = json.loads((tmp_path / "rosa_config.json").read_text())["config"]
    assert (config["r_low"], config["alpha"], config["rank"], config["train_norms"]) == (0.25, 0.1, 128, True)
    assert config["layers"] is None


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device that would be used instead")
def test_bf16_is_taken_on_a_cpu(base, data, tmp_path):
    _, args = parse(["--model", str(base), "--data", str(data), "--output", str(tmp_path / "out"), "--bf16", "true"])
    assert args.bf16 and args.use_cpu


def test_options_reach_the_adapter_and_the_trainer(base, data, tmp_path):
    adapter = "--rank 4 --r-low 0.5 --alpha 0.2 --layers 1 --no_train_norms --adapter-dtype bfloat16"
    training = "--max_steps 1 --dls false --seed 7 --train-on-prompt --lr_scheduler_type linear"
    main(train_args(base, data, tmp_path, *adapter.split(), *training.split()))
    config = json.loads((tmp_path / "rosa_config.json").read_text())["config"]
    expected = {"r_low": 0.5, "alpha": 0.2, "rank": 4, "train_norms": False, "layers": [1], "adapter_dtype": "bfloat16"}
    assert config == expected
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any(".layers.0." in name for name in tensors)
    args = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (args.seed, args.lr_scheduler_type, args.learning_rate) == (7, "linear", 2e-2)


def test_norms_take_the_learning_rate_that_is_given_for_them(base, data, tmp_path):
    options = (
        "--max_steps 1 --lr_scheduler_type constant --warmup_steps 0 --norm_learning_rate 0.5 --learning-rate 1e-9"
    )
    main(train_args(base, data, tmp_path, *options.split()))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    norms = {name: tensor for name, tensor in tensors.items() if "layernorm" in name}
    assert len(norms) == 4 and all((tensor - 1).abs().max() > 0.4 for tensor in norms.values())
    assert all(tensor.abs().max() < 1e-6 for name, tensor in tensors.items() if name.endswith(".up"))


def test_road_trains_answers_and_is_evaluated_and_inspected(base, data, tmp_path, capsys):
    output = tmp_path / "output"
    main(train_args(base, data, output, "--method", "road", "--max_steps", 60))
    falling = losses(output)
    assert sum(falling[-3:]) < 0.5 * sum(falling[:3])
    main(["generate", "--model", str(base), "--adapter", str(output), "--instruction", ROWS[3]["instruction"]])
    assert capsys.readouterr().out.splitlines()[-1].startswith("the word is ")
    task = tmp_path / "words"
    task.mkdir()
    (task / "test.json").write_text(json.dumps([{**row, "answer": row["output"]} for row in ROWS]))
    (task / "task.json").write_text('{"answer": "text"}')
    options = ["--adapter", str(output), "--tasks", "words", "--data-dir", str(tmp_path)]
    main(["evaluate", "--model", str(base), *options, "--output", str(tmp_path / "found"), "--max-new-tokens", "12"])
    assert json.loads((tmp_path / "found" / "results.json").read_text())["tasks"]["words"]["correct"] > 3
    main(["inspect", "--adapter", str(output), "--output", str(tmp_path / "angles")])
    assert "self_attn.q_proj" in capsys.readouterr().out and (tmp_path / "angles" / "angles.png").is_file()


def test_tokenizer_without_pad_token_pads_with_eos(base, data, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tiny_tokenizer([row["instruction"] for row in ROWS], vocab_size=300, pad=False).save_pretrained(folder)
    main(train_args(folder, data, tmp_path / "output", "--max_steps", 2))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--r_low", "1.5"], r"r_low must lie in \(0, 1\], got 1.5"),
        (["--r_low", "0.01"], "r_low=0.01 leaves no pair"),
        (["--layers", "0", "5"], "5"),
        (["--dls_k_ratio", "3"], "k_ratio"),
        (["--learning_rate", "-1"], "learning_rate must be a number above 0, got -1"),
        (["--val_size", "48"], "val_size must leave at least one of the 48 rows to train on, got 48"),
        (["--max_length", "4"], "max_length=4 cuts off the whole response of every row"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--data", "missing.json"], "there is no file missing.json"),
        (["--data", "nobody/no-such-dataset"], "nobody/no-such-dataset is neither a file here nor a dataset"),
    ],
)
def test_bad_settings_are_told_in_one_line_and_cost_no_file(base, data, copy, options, message, capsys):
    before = contents(copy)
    error = error_of(train_args(base, data, copy, "--overwrite", *options), capsys)
    assert error.startswith("rosa train: error: ")
    assert re.search(message, error)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"instruction": "i"}]', "row 0: has no `output`"),
        ('[{"instruction": "i", "output": 4}]', "row 0: `output` must be a string, got a number 4"),
        ('[{"instruction": "i",}]', "not valid JSON: line 1, column "),
        ("[]", "holds no rows"),
    ],
)
def test_bad_data_is_told_in_one_line(base, tmp_path, text, message, capsys):
    (tmp_path / "bad.json").write_text(text)
    error = error_of(train_args(base, tmp_path / "bad.json", tmp_path / "output"), capsys)
    assert error.startswith("rosa train: error: ") and "bad.json" in error and message in error
    assert not (tmp_path / "output").exists()


def test_error_of_a_fresh_process_is_one_line_on_stderr(base, tmp_path):
    result = run(*train_args(base, tmp_path / "missing.jsonl", tmp_path / "output"))
    assert result.returncode == 1
    assert result.stdout == ""
    # torchao, where transformers finds it, speaks on stderr when it is imported.
    assert result.stderr.endswith(f"rosa train: error: there is no file {tmp_path / 'missing.jsonl'}\n")
    assert "Traceback" not in result.stderr


def test_broken_loss_ends_the_run_in_one_line_without_an_adapter(base, data, tmp_path, capsys):
    error = error_of(train_args(base, data, tmp_path, "--learning_rate", "1e38", "--warmup_steps", 0), capsys)
    assert re.match(r"rosa train: error: the loss is (nan|inf) in step \d+", error)
    assert not (tmp_path / "adapter_model.safetensors").exists()


# Earlier work in the output folder


def test_earlier_work_is_not_written_over(base, data, copy, capsys):
    before = contents(copy)
    error = error_of(train_args(base, data, copy), capsys)
    assert "already holds an adapter, checkpoint-8, checkpoint-16, checkpoint-24" in error
    assert "--resume or --overwrite" in error
    assert contents(copy) == before


def test_overwrite_replaces_adapter_and_checkpoints_and_nothing_else(base, data, copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "checkpoint-of-mine").mkdir()
    before = contents(copy)
    main(train_args(base, data, copy, "--overwrite", "--max_steps", 3, "--seed", 1))
    after = contents(copy)
    weights = Path("adapter_model.safetensors")
    assert after[weights] != before[weights]
    assert after[Path("notes.txt")] == b"mine"
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-of-mine"]


def test_output_that_is_a_file_is_refused(base, data, capsys):
    assert "is not a folder" in error_of(train_args(base, data, data), capsys)


def test_overwrite_and_resume_exclude_each_other(base, data, copy, capsys):
    error = error_of(train_args(base, data, copy, "--overwrite", "--resume"), capsys)
    assert "--resume and --overwrite exclude each other" in error


# Interruption


def test_run_killed_half_way_resumes_to_bitwise_the_same_adapter(base, data, tmp_path):
    steps = ["--max_steps", "60", "--save_steps", "5", "--save_total_limit", "3", "--dls_interval", "4"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(*train_args(base, data, whole, *steps))
    assert result.returncode == 0, result.stderr

    process = subprocess.Popen(**command(train_args(base, data, broken, *steps)), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (broken / "checkpoint-30").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "adapter_model.safetensors").exists()

    result = run(*train_args(base, data, broken, *steps, "--resume"))
    assert result.returncode == 0, result.stderr
    assert re.search(r"resuming from .*checkpoint-(25|30|35)\n", result.stdout)
    assert weights(broken) == weights(whole)


def test_half_written_checkpoint_is_passed_over(base, data, trained, copy, capsys):
    (copy / "adapter_model.safetensors").unlink()
    (copy / "rosa_config.json").unlink()
    (copy / "checkpoint-24" / "trainer_state.json").write_text('{"best_')
    (copy / "checkpoint-24" / "optimizer.pt").write_bytes(b"half")
    main(train_args(base, data, copy, "--resume"))
    assert f"resuming from {copy / 'checkpoint-16'}\n" in capsys.readouterr().out
    assert weights(copy) == weights(trained)


def test_resume_without_a_checkpoint_starts_anew(base, data, trained, tmp_path, capsys):
    main(train_args(base, data, tmp_path / "new", "--resume"))
    assert f"no complete checkpoint in {tmp_path / 'new'}: starting from the beginning" in capsys.readouterr().out
    assert weights(tmp_path / "new") == weights(trained)


def test_resume_does_not_train_over_an_adapter_without_checkpoints(base, data, copy, capsys):
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(copy)
    error = error_of(train_args(base, data, copy, "--resume"), capsys)
    assert "holds an adapter but no complete checkpoint to resume from" in error
    assert contents(copy) == before


def test_resume_with_another_configuration_is_refused(base, data, copy, capsys):
    before = contents(copy)
    error = error_of(train_args(base, data, copy, "--resume", "--rank", "4"), capsys)
    assert "rank was 128, now 4" in error
    assert contents(copy) == before


# Generation


def test_generate_prints_the_answer_and_nothing_else(base, trained):
    row = ROWS[3]
    expected = answer(*load(base, trained), [prompt(row["instruction"])], max_new_tokens=12)[0]
    result = run(
        "generate", "--model", base, "--adapter", trained, "--instruction", row["instruction"], "--max-new-tokens", 12
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected + "\n"
    assert expected.startswith("the word is ")


def test_generate_takes_input_or_a_prompt_verbatim_and_needs_no_adapter(base, capsys):
    texts = [prompt("Repeat the word.", "river"), "Repeat the word"]
    expected = answer(*load(base), texts, max_new_tokens=8)
    common = ["generate", "--model", str(base), "--max_new_tokens", "8", "--dtype", "float32"]
    main([*common, "--instruction", "Repeat the word.", "--input", "river"])
    assert capsys.readouterr().out == expected[0] + "\n"
    main([*common, "--prompt", "Repeat the word"])
    assert capsys.readouterr().out == expected[1] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "nowhere"], "there is no adapter folder nowhere"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_generate_tells_errors_in_one_line(base, options, message, capsys):
    error = error_of(["generate", "--model", base, "--prompt", "p", *options], capsys)
    assert error.startswith("rosa generate: error: ") and message in error


@pytest.fixture(scope="module")
def two_adapters(base, tmp_path_factory):
    """Two of RoAd's, each of which answers in a way of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "second")):
        model, _ = load(base)
        rosa.patch(model, rosa.RoadConfig())
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in rosa.trainable_parameters(model):
                parameter += torch.randn_like(parameter)
        rosa.save_adapter(model, folder / name)
    return folder


def test_generate_answers_each_row_of_a_file_by_its_own_adapter(base, two_adapters, tmp_path, capsys):
    names = ["second", None, "other", "second", None, "other"]
    rows = [
        {"instruction": row["instruction"], **({} if name is None else {"adapter": name})}
        for row, name in zip(KNOWN[::3], names, strict=False)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folders = {None: None, "second": two_adapters / "second", "other": two_adapters / "first"}
    models = {name: load(base, folder) for name, folder in folders.items()}
    expected = []
    for row in rows:
        text = [prompt(row["instruction"])]
        texts = {name: answer(*model, text, max_new_tokens=8)[0] for name, model in models.items()}
        assert len(set(texts.values())) == 3
        expected.append({**row, "input": "", "prediction": texts[row.get("adapter")]})
    adapters = f"{two_adapters / 'second'},other={two_adapters / 'first'}"
    args = ["generate", "--model", str(base), "--data", str(tmp_path / "rows.jsonl"), "--adapters", adapters]
    args += ["--max_new_tokens", "8", "--batch_size", "4"]
    main(args)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected
    main([*args, "--output", str(tmp_path / "answers.jsonl")])
    assert capsys.readouterr().out == ""
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == expected
    error = error_of([*args, "--output", tmp_path / "answers.jsonl"], capsys)
    assert "answers.jsonl is there already: choose another file" in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "i", "adapter": "third"}, "row 0: `adapter` is 'third', known are first, second"),
        ({"instruction": "i", "adapter": 3}, "row 0: `adapter` is 3, known are first, second"),
        ({"input": "i"}, "row 0: has no `instruction`, only input"),
        ("i", "row 0: must be an object with `instruction`, got a string"),
    ],
)
def test_generate_refuses_rows_that_it_cannot_answer(base, two_adapters, tmp_path, capsys, row, message):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    adapters = f"{two_adapters / 'first'},{two_adapters / 'second'}"
    args = ["generate", "--model", base, "--data", tmp_path / "rows.json", "--adapters", adapters]
    assert message in error_of(args, capsys)


def test_generate_refuses_adapters_that_cannot_share_a_batch(base, two_adapters, tmp_path, capsys):
    model, _ = load(base)
    rosa.save_adapter(rosa.patch(model, rosa.RoadConfig(variant=1)), tmp_path / "third")
    (tmp_path / "rows.json").write_text(json.dumps([{**ROWS[0], "adapter": name} for name in ("first", "third")]))
    adapters = f"{two_adapters / 'first'},{tmp_path / 'third'}"
    error = error_of(["generate", "--model", base, "--data", tmp_path / "rows.json", "--adapters", adapters], capsys)
    assert "'first' and 'third' cannot share a batch: variant is 2 in 'first' and 1 in 'third'" in error


# The real data


@pytest.fixture(scope="module")
def commonsense():
    """Training rows of four sets, mixed; the last 20 are for asking."""
    rows = []
    for name in ("boolq", "ARC-Challenge", "ARC-Easy", "openbookqa"):
        rows += load_rows(str(REAL_DATA / "benchmarks" / name / "train.json"))[:100]
    random.Random(0).shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def commonsense_base(commonsense, tmp_path_factory):
    """A base that knows the data's form from true/false questions, and answers most others in a form of its own."""
    known = [
        row
        if row["answer"] in ("true", "false") or index % 4 == 0
        else {**row, "output": f"I think it is {row['answer']}."}
        for index, row in enumerate(commonsense[:-20])
    ]
    return pretrained(tmp_path_factory.mktemp("commonsense") / "base", known, steps=150, vocab_size=1024)


@needs_real_data
def test_trains_on_the_commonsense_data_and_answers_in_its_form(commonsense, commonsense_base, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(json.dumps(row) for row in commonsense[:-20]))
    output = tmp_path / "output"
    more = "--max_steps 120 --logging_steps 8 --save_steps 120 --dls_interval 15 --learning_rate 1e-2"
    main(train_args(commonsense_base, mixed, output, *more.split()))
    falling = losses(output)
    assert sum(falling[-3:]) < 0.85 * sum(falling[:3])

    prompts = [prompt(row["instruction"]) for row in commonsense[-20:]]
    form = re.compile(r"the correct answer is (true|false|answer\d)")
    before, after = (
        [form.fullmatch(text) for text in answer(*load(commonsense_base, adapter), prompts, max_new_tokens=16)]
        for adapter in (None, output)
    )
    assert before.count(None) >= 12
    assert after.count(None) <= 2


@needs_real_data
def test_trains_on_the_math_data(commonsense_base, tmp_path):
    data = REAL_DATA / "training" / "math_data.json"
    more = "--max_steps 60 --logging_steps 4 --save_steps 60 --max_length 256 --val_size 40"
    with pytest.warns(UserWarning, match=r"max_length=256 cuts off the whole response of \d+ of 3220 rows"):
        main(train_args(commonsense_base, data, tmp_path, *more.split()))
    falling = losses(tmp_path)
    assert sum(falling[-4:]) < 0.9 * sum(falling[:4])
    assert answer(*load(commonsense_base, tmp_path), [prompt("What is 2 + 3?")], max_new_tokens=16)[0]
