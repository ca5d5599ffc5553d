"""`rosa train` on an output folder that holds something: what a checkpoint was made with, two processes, interruption,
and runs that would save nothing worth having."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import rosa
from rosa.storage.locking import alone_in
from rosa.training.finetune import finetune
from rosa.training.parsing import parse
from rosa.training.resuming import last_checkpoint
from tests.rosa.tiny_qwen2 import save_base

ROOT = Path(__file__).parents[3]
ROWS = [{"instruction": f"Add {i} and {i}.", "output": f"The answer is {2 * i}"} for i in range(16)]

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("model") / "base", ROWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(ROWS))
    return file


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """A run of 6 steps with checkpoints at 2, 4 and 6. Copy it before changing it."""
    output = tmp_path_factory.mktemp("trained") / "output"
    train(base, data, output)
    return output


@pytest.fixture
def copy(trained, tmp_path):
    """The run as if it had been killed after its second checkpoint."""
    output = Path(shutil.copytree(trained, tmp_path / "copy"))
    for name in ("checkpoint-6", "adapter_model.safetensors", "rosa_config.json", "config.json"):
        remove = shutil.rmtree if name.startswith("checkpoint") else os.unlink
        remove(output / name)
    return output


def train(base, data, output, *more):
    """Short and small: `more` comes last, so it wins."""
    rosa = "" if "--method" in more else "--rank 4"
    steps = f"--max_steps 6 --save_steps 2 --logging_steps 2 --learning_rate 1e-2 --disable_tqdm true {rosa}"
    files = ["--model", str(base), "--data", str(data), "--output", str(output)]
    return finetune(*parse([*files, *steps.split(), *map(str, more)]))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a checkpoint was made with


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "1e-3"], "learning_rate was 0.01, now 0.001"),
        (["--weight_decay", "0.1"], "weight_decay was 0.0, now 0.1"),
        (["--optim", "sgd"], "optim was adamw_torch_fused, now sgd"),
        (["--seed", "1"], "dls_seed was 42, now 1; seed was 42, now 1"),
        (["--dls_interval", "3", "--alpha", "0.2"], "alpha was 0.1, now 0.2; dls_interval was 40, now 3"),
        (["--dls", "false"], "dls was True, now False"),
        (["--max_length", "2000"], "max_length was 2048, now 2000"),
        (["--gradient_accumulation_steps", "1"], "rows of a step was 4, now 2"),
        (["--padding_free"], "padding_free was False, now True"),
        (["--load_in", "8bit"], "load_in was None, now 8bit"),
        (
            ["--train_sampling_strategy", "group_by_length"],
            "train_sampling_strategy was random, now group_by_length",
        ),
    ],
)
def test_another_setting_is_refused_by_name(base, data, copy, options, message):
    before = contents(copy)
    with pytest.raises(ValueError, match=re.escape(f"checkpoint-4 was made with other settings: {message}")):
        train(base, data, copy, "--resume", *options)
    assert contents(copy) == before


def test_another_base_of_the_same_shape_and_other_data_are_refused(base, data, copy, tmp_path):
    other, rows = save_base(tmp_path / "other", ROWS, seed=1), tmp_path / "rows.json"
    with pytest.raises(ValueError, match=r"other settings: base was \w{16}, now \w{16}\. --resume"):
        train(other, data, copy, "--resume")
    rows.write_text(json.dumps([*ROWS[:-1], {"instruction": "Add.", "output": "No."}]))
    with pytest.raises(ValueError, match=r"other settings: data was \w{16}, now \w{16}\. --resume"):
        train(base, rows, copy, "--resume")


def test_what_does_not_decide_what_is_learnt_may_change(base, data, trained, copy, tmp_path, capsys):
    """Another spelling of the base and the data, another division of a step's rows, another cadence of logging."""
    linked = tmp_path / "linked"
    linked.symlink_to(base)
    moved = shutil.copy(data, tmp_path / "moved.json")
    division = "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 --logging_steps 3 --bf16 false"
    train(linked, moved, copy, "--resume", *division.split())
    told = capsys.readouterr().out
    assert f"resuming from {copy / 'checkpoint-4'}\nsince then logging_steps was 2, now 3\n" in told
    assert (copy / "checkpoint-6").is_dir()
    assert (copy / "made_with.json").exists() is False


def test_the_same_settings_go_on_without_a_word(base, data, trained, copy, capsys):
    train(base, data, copy, "--resume")
    assert "since then" not in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "checkpoint-6/adapter_model.safetensors", "checkpoint-6/made_with.json"):
        assert (copy / name).read_bytes() == (trained / name).read_bytes()


def test_more_steps_are_made_and_the_other_schedule_is_told(base, data, copy, capsys):
    trainer = train(base, data, copy, "--resume", "--max_steps", 8)
    assert trainer.state.global_step == 8
    told = "since then max_steps was 6, now 8; the learning rate now follows a cosine schedule of the new length\n"
    assert told in capsys.readouterr().out


def test_fewer_steps_than_were_made_are_refused(base, data, copy):
    before = contents(copy)
    with pytest.raises(ValueError, match="checkpoint-4 is past the 3 steps that are asked for"):
        train(base, data, copy, "--resume", "--max_steps", 3)
    assert contents(copy) == before


def test_a_finished_run_is_saved_again_without_a_step(base, data, trained, tmp_path, capsys):
    output = Path(shutil.copytree(trained, tmp_path / "copy"))
    (output / "adapter_model.safetensors").unlink()
    trainer = train(base, data, output, "--resume")
    assert trainer.state.global_step == 6 and trainer.tokens_per_second is None
    assert f"{output / 'checkpoint-6'} has all 6 steps: nothing is left to train" in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (trained / name).read_bytes()


def test_a_checkpoint_that_does_not_say_what_it_was_made_with_is_refused(base, data, copy):
    (copy / "checkpoint-4" / "made_with.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 does not say what it was made with \(made_with\.json is"):
        train(base, data, copy, "--resume")


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_checkpoints_that_lack_the_state_of_training_are_not_begun_anew_in_silence(base, data, copy, missing):
    for checkpoint in copy.glob("checkpoint-*"):
        (checkpoint / missing).unlink()
    before = contents(copy)
    with pytest.raises(ValueError, match=f"cannot go on from .*checkpoint-4: {missing} is missing"):
        train(base, data, copy, "--resume")
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("made_with.json", b"5", "does not say what it was made with"),
        ("made_with.json", b"[" * 100_000, "does not say what it was made with"),
        ("optimizer.pt", 5, "optimizer.pt or scheduler.pt in .*checkpoint-4 cannot be loaded"),
        ("scheduler.pt", [1], "optimizer.pt or scheduler.pt in .*checkpoint-4 cannot be loaded"),
    ],
)
def test_a_file_of_a_checkpoint_that_holds_something_else_is_told(base, data, copy, file, content, message):
    path = copy / "checkpoint-4" / file
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        train(base, data, copy, "--resume")


@pytest.mark.parametrize("content", ["", "5", "{}", '{"global_step": null}', "[" * 100_000])
def test_a_checkpoint_whose_state_was_cut_short_is_passed_over(copy, content):
    (copy / "checkpoint-4" / "trainer_state.json").write_text(content)
    assert last_checkpoint(copy) == str(copy / "checkpoint-2")


def test_a_trainer_of_any_method_refuses_what_is_not_complete(base, data, tmp_path):
    trainer = train(base, data, tmp_path, "--method", "ln_tuning", "--max_steps", 2)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="optimizer.pt is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_arguments_that_the_schedule_does_not_take_are_told(base, data, tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs .* do not fit the schedule"):
        train(base, data, tmp_path, "--lr_scheduler_kwargs", '{"nothing": 1}')


def test_baselines_know_what_they_were_made_with_too(base, data, tmp_path):
    lora = ["--method", "lora", "--peft", '{"r": 2}']
    train(base, data, tmp_path, *lora, "--max_steps", 2)
    with pytest.raises(ValueError, match=r"peft was \{'r': 2\}, now \{'r': 4\}"):
        train(base, data, tmp_path, "--method", "lora", "--peft", '{"r": 4}', "--resume", "--max_steps", 2)
    # Written another way these are the same settings.
    trainer = train(base, data, tmp_path, "--method", "lora", "--peft", '{"r":2}', "--resume", "--max_steps", 3)
    assert trainer.state.global_step == 3


def test_road_knows_what_it_was_made_with(base, data, tmp_path, capsys):
    road = ["--method", "road", "--max_steps", 2]
    train(base, data, tmp_path, *road, "--variant", 1)
    made = json.loads((tmp_path / "checkpoint-2" / "made_with.json").read_text())
    assert (made["method"], made["variant"], made["train_norms"], made["dls"]) == ("road", 1, False, False)
    assert not {"rank", "alpha", "dls_interval"} & made.keys()
    for other, message in (
        (["--variant", 2], "variant was 1, now 2"),
        (["--variant", 1, "--targets", "q_proj"], r"targets was \['all-linear'\], now \['q_proj'\]"),
        (["--variant", 1, "--dls", "true"], "dls was False, now True"),
        (["--method", "rosa"], "method was road, now rosa"),
    ):
        with pytest.raises(ValueError, match=message):
            train(base, data, tmp_path, *road, *other, "--resume")
    trainer = train(base, data, tmp_path, *road, "--variant", 1, "--max_steps", 3, "--resume")
    assert trainer.state.global_step == 3 and "variant" not in capsys.readouterr().out


def test_a_checkpoint_from_before_an_option_existed_goes_on(base, data, copy, capsys):
    file = copy / "checkpoint-4" / "made_with.json"
    made = json.loads(file.read_text())
    del made["dls_score"]
    file.write_text(json.dumps(made))
    train(base, data, copy, "--resume")
    assert "since then" not in capsys.readouterr().out and (copy / "checkpoint-6").is_dir()


def test_no_secret_is_written_down(base, data, tmp_path):
    train(base, data, tmp_path, "--hub_token", "hf_secret", "--max_steps", 1, "--save_steps", 1)
    assert "hf_secret" not in (tmp_path / "checkpoint-1" / "made_with.json").read_text()


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method lora --rank 128", """rank: RoSA's alone, and the method is lora.*--peft '{"r": 4}'"""),
        (
            "--method vera --no_train_norms --r-low 0.5",
            "r_low: RoSA's alone, train_norms: RoSA's and RoAd's alone, and the method is vera, whose settings",
        ),
        ("--variant 1", "variant: RoAd's alone, and the method is rosa$"),
        ("--method road --alpha 0.2 --rank 4", "alpha, rank: RoSA's alone, and the method is road$"),
        ("--method lora --targets q_proj", "targets: RoAd's alone, and the method is lora, whose settings"),
        ("--method road --peft {}", "--peft holds the settings of a baseline, and the method is RoAd"),
        ("--method road --dls_score norms", "layer selection is off, and nothing else reads dls_score"),
        ("--method road --variant 3", "argument --variant: invalid choice: '3'"),
        ("--method lora --dls_interval 5", "layer selection is off, and nothing else reads dls_interval"),
        ("--dls false --dls_k_ratio 0.5", "layer selection is off, and nothing else reads dls_k_ratio"),
        ("--peft {}", "--peft holds the settings of a baseline, and the method is RoSA"),
        ("--resume --save_only_model", "--resume needs what --save_only_model leaves out"),
    ],
)
def test_options_that_nothing_would_read_are_refused(options, message):
    with pytest.raises(argparse.ArgumentError, match=message):
        parse(["--model", "m", "--data", "d", "--output", "o", *options.split()])


@pytest.mark.parametrize(
    ("options", "config", "selection"),
    [
        ("", rosa.RoadConfig(), None),
        ("--targets all-linear --train_norms", rosa.RoadConfig(train_norms=True), None),
        (
            "--variant 1 --targets q_proj v_proj --pairing 16 --layers 1 --adapter_dtype float64 --dls true",
            rosa.RoadConfig(1, ("q_proj", "v_proj"), 16, (1,), "float64"),
            "adapter",
        ),
        ("--pairing rope --dls true --train_norms", rosa.RoadConfig(pairing="rope", train_norms=True), "norms"),
        ("--dls true --dls_score norms", rosa.RoadConfig(), "norms"),
    ],
)
def test_road_reads_its_own_options_and_selects_layers_only_when_told(options, config, selection):
    job, args = parse(["--model", "m", "--data", "d", "--output", "o", "--method", "road", *options.split()])
    assert job.config == config
    assert (job.layer_selection(0) or {}).get("score") == selection
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (3e-3, "linear", 0.1)  # of its paper


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pairing heads", "pairing must be 'neighbours', 'half', 'rope' or an even group size from 2, got 'heads'"),
        ("--pairing 7", "or an even group size from 2, got 7"),
        ("--targets qq_proj", "targets names 'qq_proj', which there is none of: .* k_proj"),
        ("--layers 9", "layers names layer 9"),
    ],
)
def test_what_road_cannot_be_is_told_and_nothing_written(base, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(base, data, tmp_path / "out", "--method", "road", *options.split())
    assert not (tmp_path / "out").exists()


def test_options_of_a_file_are_refused_alike_but_for_those_of_its_own_method(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nmethod: lora\nrank: 8\n")
    with pytest.raises(argparse.ArgumentError, match="rank: RoSA's alone"):
        parse(["--config", str(file)])
    file.write_text("model: m\ndata: d\noutput: o\nrank: 8\ndls_interval: 5\n")
    assert parse(["--config", str(file)])[0].rank == 8
    with pytest.warns(UserWarning, match="job.yaml says dls_interval, rank to its own method alone, not to lora"):
        job, _ = parse(["--config", str(file), "--method", "lora"])
    assert job.method == "lora" and job.layer_selection(0) is None
    with pytest.warns(UserWarning, match="says rank to its own method"):
        job, _ = parse(["--config", str(file), "--method", "lora", "--dls", "true"])
    assert job.layer_selection(0)["interval"] == 5
    with pytest.raises(argparse.ArgumentError, match="rank: RoSA's alone"):
        parse(["--config", str(file), "--method", "lora", "--rank", "4"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("learning_rate", "inf", "learning_rate must be a number above 0, got inf"),
        ("learning_rate", "0", "learning_rate must be a number above 0, got 0"),
        ("norm_learning_rate", "nan", "norm_learning_rate must be a number above 0, got nan"),
        ("weight_decay", "-1", "weight_decay must be a number from 0, got -1"),
        ("max_grad_norm", "nan", "max_grad_norm must be a number from 0, got nan"),
        ("gradient_accumulation_steps", "0", "gradient_accumulation_steps must be a number above 0, got 0"),
        ("per_device_train_batch_size", "0", "per_device_train_batch_size must be a number above 0, got 0"),
        ("save_steps", "0", "save_steps must be a number above 0, got 0"),
        ("logging_steps", "-2", "logging_steps must be a number above 0, got -2"),
        ("num_train_epochs", "0", "num_train_epochs must be a number above 0, got 0"),
        ("max_steps", "0", "max_steps must be above 0, or -1 for num_train_epochs to count"),
    ],
)
def test_numbers_that_make_no_training_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        parse(["--model", "m", "--data", "d", "--output", "o", f"--{option}", value])


# Runs that would save nothing worth having


def test_a_batch_that_is_dropped_for_want_of_rows_leaves_nothing_to_train(base, data, tmp_path):
    options = "--dataloader_drop_last true --per_device_train_batch_size 20"
    with pytest.raises(
        ValueError, match="--dataloader_drop_last leaves nothing to train on: 16 rows are less than .* 20"
    ):
        train(base, data, tmp_path / "output", *options.split())
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("method", ["rosa", "lora"])
def test_what_the_last_step_broke_is_not_saved(base, data, tmp_path, method):
    options = "--learning_rate 1e38 --max_steps 1 --lr_scheduler_type constant --warmup_steps 0 --optim sgd"
    with pytest.raises(FloatingPointError, match="parameters are no longer finite after step 1"):
        train(base, data, tmp_path / "output", "--method", method, *options.split(), "--weight_decay", 1e38)
    assert not list((tmp_path / "output").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report_to", "wandb"], "--report_to wandb: .*wandb to be installed"),
        (["--optim", "galore_adamw"], "--optim galore_adamw: .*galore_torch"),
    ],
)
def test_a_missing_package_is_named(base, data, copy, options, message):
    before = contents(copy)
    with pytest.raises(ValueError, match=message):
        train(base, data, copy, "--overwrite", "--optim_target_modules", "all-linear", *options)
    assert contents(copy) == before


def test_a_base_without_a_tokenizer_or_with_truncated_weights_is_named(base, data, tmp_path):
    bare, broken = (Path(shutil.copytree(base, tmp_path / name)) for name in ("bare", "broken"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"tokenizer.*{bare}|{bare}.*tokenizer"):
        train(bare, data, tmp_path / "output")
    with pytest.raises(ValueError, match=r"broken cannot be loaded: model\.safetensors is truncated"):
        train(broken, data, tmp_path / "output")
    assert not (tmp_path / "output").exists()


# The output folder


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--resume"]])
def test_the_folder_of_a_model_is_no_output(base, data, tmp_path, flag):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    before = contents(other)
    with pytest.raises(ValueError, match=f"{other} holds a model"):
        train(base, data, other, *flag)
    assert contents(other) == before


def test_a_second_process_in_the_same_folder_is_refused(base, data, copy):
    with alone_in(copy):
        before = contents(copy)
        with pytest.raises(ValueError, match=f"another process is at work in {copy}"):
            train(base, data, copy, "--resume")
        assert contents(copy) == before


def test_a_folder_in_which_another_process_has_trained_meanwhile_is_left_alone(base, data, trained, copy, monkeypatch):
    begin = Trainer.get_train_dataloader

    def after_another_process(self):
        shutil.copytree(trained / "checkpoint-6", copy / "checkpoint-6")
        return begin(self)

    monkeypatch.setattr(Trainer, "get_train_dataloader", after_another_process)
    with pytest.raises(ValueError, match=f"another process has trained in {copy} since this one began"):
        train(base, data, copy, "--resume")
    assert (copy / "trainer_state.json").read_bytes() == (trained / "trainer_state.json").read_bytes()


def test_the_folder_is_free_again_after_a_run_and_after_an_error(base, data, tmp_path):
    with pytest.raises(FloatingPointError):
        train(base, data, tmp_path, "--learning_rate", "1e38", "--warmup_steps", 0)
    train(base, data, tmp_path, "--max_steps", 1, "--save_strategy", "no")
    with alone_in(tmp_path):
        pass


# Interruption


def test_ctrl_c_leaves_one_line_that_names_the_checkpoint_that_stands(base, data, tmp_path):
    endless = ["--max_steps", "1000000", "--logging_steps", "1000000", "--disable_tqdm", "true", "--rank", "4"]
    saving = {"saves": ["--save_steps", "20", "--save_total_limit", "2"], "never-saves": ["--save_strategy", "no"]}
    runs = {}
    for name, options in saving.items():
        paths = ["--model", str(base), "--data", str(data), "--output", str(tmp_path / name)]
        command = [sys.executable, "-m", "rosa", "train", *paths, *endless, *options]
        runs[name] = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have background jobs ignore it
        )  # fmt: skip
    try:
        _wait_for(lambda: (tmp_path / "never-saves" / ".lock").exists(), runs["never-saves"])
        _wait_for(lambda: last_checkpoint(tmp_path / "saves") is not None, runs["saves"])
        errors = {name: _interrupt(process) for name, process in runs.items()}
    finally:
        for process in runs.values():
            process.kill()
    assert {process.returncode for process in runs.values()} == {130}
    assert not any("Traceback" in error for error in errors.values())
    lines = {name: error.splitlines()[-1] for name, error in errors.items()}
    stands = last_checkpoint(tmp_path / "saves")
    assert lines["saves"] == f"rosa train: interrupted: {stands} stands: --resume goes on from it"
    assert lines["never-saves"] == "rosa train: interrupted: no checkpoint was saved yet"
    with alone_in(tmp_path / "saves"):
        pass


def _interrupt(process):
    """What a process says to Ctrl-C; again, should something have swallowed it."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the process does not end")


def _wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
