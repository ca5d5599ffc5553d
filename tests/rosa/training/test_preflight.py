"""What `rosa train` refuses before rows are read and weights are loaded, and a dry run as well."""

import json
import re

import pytest

from rosa.cli import main
from tests.rosa.tiny_qwen2 import save_base

ROWS = [{"instruction": f"Add {i} and {i}.", "output": f"The answer is {2 * i}"} for i in range(16)]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The arguments of a job on a base whose weights nobody can load."""
    folder = tmp_path_factory.mktemp("preflight")
    save_base(folder / "base", ROWS)
    (folder / "base" / "model.safetensors").unlink()
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return ["--model", str(folder / "base"), "--data", str(folder / "rows.json")]


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dls_k_ratio", "2"], r"dls_k_ratio must lie in \(0, 1\], got 2.0"),
        (["--dls_p_exploit", "-0.1"], r"dls_p_exploit must lie in \[0, 1\], got -0.1"),
        (["--dls_interval", "0"], "dls_interval must be at least 1 step, got 0"),
        (["--dls_warmup_steps", "-1"], "dls_warmup_steps must be a number from 0, got -1"),
        (["--adam_beta1", "1"], r"adam_beta1 must lie in \[0, 1\), got 1.0"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers must be a number from 0, got -1"),
        (["--save_total_limit", "0"], "save_total_limit must be at least 1, got 0"),
        (["--val_size", "2.5"], "val_size must be a whole number of rows, or a share below 1, got 2.5"),
        (["--eval_strategy", "steps"], "--eval_strategy steps needs rows that are held out: give --val_size"),
        (["--metric_for_best_model", "accuracy"], "--metric_for_best_model must be loss: .* got accuracy"),
        (["--norm_learning_rate", "1e-4", "--no_train_norms"], "--norm_learning_rate is that of norms which train"),
        (["--method", "adalora", "--dls", "true"], "AdaLoRA .*: leave out --dls true, or take another --method"),
        (["--layers", "9"], "layer.* 9"),
        (["--method", "road", "--targets", "foo_proj"], ".*foo_proj"),
        (["--method", "lora", "--peft", '{"rr": 8}'], ".*rr"),
        (["--method", "c3a"], "c3a does not fit Qwen2ForCausalLM"),
        (["--attn_implementation", "fast"], 'no model can be loaded from .* `attn_implementation="fast"`'),
        (["--report_to", "foo"], "--report_to foo: foo is not supported"),
        (["--optim_args", "foo"], "--optim adamw_torch.* --optim_args foo: not enough values to unpack"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr: .*min_lr"),
        (["--push_to_hub", "true"], "--push_to_hub: .* Log in with `hf auth login`, or leave it out"),
    ],
)
def test_is_refused(job, options, message, dry, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", *job, "--output", str(tmp_path / "out"), *options, *dry])
    said = capsys.readouterr()
    assert exit.value.code in (1, 2) and re.search(f"^rosa train: error: {message}", said.err, re.MULTILINE), said.err
    assert "data: " not in said.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed(job, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{package}_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["train", *job, "--output", str(tmp_path / "out"), "--report_to", package, "--dry_run"])
    assert f"rosa train: error: --report_to {package}: " in capsys.readouterr().err


def test_liger_that_is_not_installed(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rosa.training.preflight.is_liger_kernel_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["train", *job, "--output", str(tmp_path / "out"), "--use_liger_kernel", "true"])
    assert "--use_liger_kernel needs the package liger-kernel" in capsys.readouterr().err


def test_a_dry_run_into_a_folder_with_an_adapter(job, tmp_path, capsys):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(SystemExit):
        main(["train", *job, "--output", str(tmp_path), "--dry_run"])
    assert f"{tmp_path} already holds checkpoint-4: choose another, or pass --resume" in capsys.readouterr().err
    main(["train", *job, "--output", str(tmp_path), "--dry_run", "--overwrite"])
    assert "memory of a step" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made(job, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["train", *job, "--output", str(tmp_path / "file" / "out")])
    assert f"--output {tmp_path}/file/out cannot be made, as {tmp_path}/file is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--lr=1e-3", "--learning_rate"),
        ("--model-name-or-path", "--model"),
        ("--warmup_ratio", r"--warmup_steps \(below 1 it is a share\)"),
        ("--learning_rat", "--learning_rate"),
    ],
)
def test_another_commands_option_is_told_by_its_name_here(job, option, meant, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", *job, "--output", str(tmp_path), option])
    assert re.search(rf"unrecognized arguments: {option}; did you mean {meant}\?", capsys.readouterr().err)


def test_an_option_that_is_like_none_is_told_alone(job, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", *job, "--output", str(tmp_path), "--zzz"])
    assert "unrecognized arguments: --zzz; see" in capsys.readouterr().err
