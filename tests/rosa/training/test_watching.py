"""What `rosa train` tells: its lines, its summary, and its picture, of real runs of a tiny model."""

import json
import re
import sys

import pytest
from matplotlib.image import imread

from rosa.cli import main
from rosa.training.finetune import finetune
from rosa.training.parsing import parse
from rosa.training.watching import summary
from tests.rosa.tiny_qwen2 import save_base

ROWS = [{"instruction": f"Add {i} and {i}.", "output": f"The answer is {2 * i}"} for i in range(24)]
LINE = re.compile(
    r" ?(\d+)/12  loss (\d\.\d{4})  lr (\d\.\de-\d\d)  ([\d,]+) tok/s  layers (\d)/2  \d:\d\d left", re.MULTILINE
)

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_base(folder / "base", ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


def arguments(files, output, *more):
    selection = [] if "--dls" in more else ["--dls_interval", "5"]
    steps = "--max_steps 12 --logging_steps 2 --save_steps 6 --rank 4 --learning_rate 1e-2"
    paths = ["--model", files / "base", "--data", files / "rows.json", "--output", output]
    return [*map(str, paths), *steps.split(), *selection, *more]


@pytest.fixture(scope="module")
def watched(files, tmp_path_factory):
    """The folder and the standard output of a run with held-out rows, and the log that the Trainer kept."""
    folder = tmp_path_factory.mktemp("a run") / "out"
    printed = folder.parent / "printed.txt"
    with printed.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        evaluated = "--val_size 4 --eval_strategy steps --eval_steps 6"
        main(["train", *arguments(files, folder, *evaluated.split())])
    return folder, printed.read_text(), json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_every_logged_loss_has_a_line_of_80_columns(watched):
    _, printed, log = watched
    losses = [entry for entry in log if "loss" in entry]
    lines = LINE.findall(printed)
    assert [(int(step), float(loss), float(rate)) for step, loss, rate, _, _ in lines] == [
        (entry["step"], round(entry["loss"], 4), float(f"{entry['learning_rate']:.1e}")) for entry in losses
    ]
    assert all(int(speed.replace(",", "")) > 0 for *_, speed, _ in lines)
    # All layers train until the first selection, in step 5.
    assert [int(layers) for *_, layers in lines] == [2, 2, 1, 1, 1, 1]
    assert re.search(r"^ 1/12  \d+\.\d s for this step, \d:\d\d left$", printed, re.MULTILINE)
    assert max(len(line) for line in printed.splitlines() if "/12 " in line) <= 80


def test_evaluations_have_lines_and_nothing_is_printed_as_the_log_has_it(watched):
    _, printed, log = watched
    first, last = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert last < first
    assert f"\n 6/12  held-out loss {first:.4f}\n" in printed
    assert f"\n12/12  held-out loss {last:.4f}, the lowest so far\n" in printed
    assert "{" not in printed and "dls/" not in printed and "it/s" not in printed


def test_the_end_tells_what_came_of_it_and_how_to_use_it(watched):
    folder, printed, log = watched
    loss, held_out = ([entry[name] for entry in log if name in entry] for name in ("loss", "eval_loss"))
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert printed.endswith(
        f"""{folder / "train.png"} shows the run
loss           {loss[0]:.4f} at step 2, {loss[-1]:.4f} at step 12
held-out loss  {held_out[0]:.4f} at step 6, {held_out[1]:.4f} at step 12
adapter        {folder}, {size / 1e3:.1f} kB
talk to it     rosa chat --adapter '{folder}'
ask it         rosa generate --adapter '{folder}' --instruction "..."
"""
    )


def test_where_the_held_out_loss_was_lowest_is_told_where_that_is_not_the_end(files, tmp_path):
    evaluated = ["--val_size", "4", "--eval_strategy", "steps", "--eval_steps", "6"]
    highest = ["--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    trainer = finetune(*parse(arguments(files, tmp_path / "out", *evaluated, *highest)))
    assert "at step 12; the adapter is that of step 6\n" in summary(trainer)
    trainer.args.load_best_model_at_end = False
    next(entry for entry in trainer.state.log_history if "eval_loss" in entry)["eval_loss"] = 0.125
    kept = tmp_path / "out" / "checkpoint-6"
    assert f"at step 12; lowest 0.1250 at step 6, {kept}\n" in summary(trainer)
    kept.rename(tmp_path / "gone")
    assert "at step 12; lowest 0.1250 at step 6, of which nothing is kept\n" in summary(trainer)
    assert f"--adapter {tmp_path / 'out'} --load-in 4bit --instruction" in summary(trainer, "4bit")


def test_the_last_step_is_told_whatever_the_logging_steps(files, tmp_path, capsys):
    main(["train", *arguments(files, tmp_path / "out", "--logging_steps", "10")])
    printed = capsys.readouterr().out
    assert [int(step) for step, *_ in LINE.findall(printed)] == [10, 12]
    assert re.search(r"^loss +\d.\d{4} at step 10, \d.\d{4} at step 12$", printed, re.MULTILINE)
    assert "RoSA: 12 steps, 4 rows a step, learning rate 0.01\n" in printed


def test_a_run_is_drawn_beside_its_adapter(watched):
    assert imread(watched[0] / "train.png").shape[1] == 1200


def test_a_run_without_matplotlib_ends_well_without_a_picture(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith(("matplotlib.", "rosa.inspection"))]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "train.png").write_text("of an earlier run")
    main(["train", *arguments(files, tmp_path, "--dls", "false")])
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'train.png'} is not drawn: " in printed and "rosa chat --adapter" in printed
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "train.png").exists()
    assert re.search(r"^ 4/12  loss \d\.\d{4}  lr \d\.\de-\d\d  [\d,]+ tok/s  \d:\d\d left$", printed, re.MULTILINE)
