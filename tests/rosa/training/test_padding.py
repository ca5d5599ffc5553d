"""The share of tokens that is padding, and batches grouped by length, in an order that a resumed run keeps."""

import json
import re
import shutil

import pytest

from rosa.storage.settings import load_settings
from rosa.training.finetune import finetune
from rosa.training.padding import padding_share
from rosa.training.parsing import parse
from tests.rosa.tiny_qwen2 import save_base
from tests.rosa.training.test_resuming import ROOT
from tests.rosa.training.test_resuming import ROWS as SUMS

ROWS = [{"instruction": f"Add {'one and ' * (7 * i % 18)}{i}.", "output": f"It is {i % 7 + i}"} for i in range(18)]
GROUPED = ("--train_sampling_strategy", "group_by_length")

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("model") / "base", SUMS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(ROWS))
    return file


@pytest.fixture
def run(base, data, tmp_path):
    """Two epochs of 5 steps, of two batches of two rows each, but for the last, which has one batch."""

    def run(output, *more):
        options = "--rank 4 --num_train_epochs 2 --save_strategy steps --save_steps 1 --disable_tqdm true"
        files = ["--model", str(base), "--data", str(data), "--output", str(tmp_path / output)]
        return finetune(*parse([*files, *options.split(), *more]))

    return run


def told_padding(capsys):
    """The share that was printed, and what was said of it."""
    share, what = re.search(r"^padding: (.*)% of the tokens(.*)$", capsys.readouterr().out, re.MULTILINE).groups()
    return float(share), what


def test_padding_fills_every_row_up_to_the_longest_of_its_batch():
    assert padding_share([4, 2, 1, 3], [(0, 1), (2, 3)]) == pytest.approx(4 / 14)
    assert padding_share([4, 2, 1, 3], [(0, 3), (2, 1)]) == pytest.approx(2 / 12)
    assert padding_share([4, 2, 1, 3], [(0,), (1,), (2,), (3,)]) == 0


def test_a_run_says_how_much_of_it_is_padding_and_grouping_leaves_less(run, tmp_path, capsys):
    (tmp_path / "many.json").write_text(json.dumps(ROWS * 4))
    options = ("--data", str(tmp_path / "many.json"), "--max_steps", "1")
    run("random", *options)
    at_random, what = told_padding(capsys)
    assert 5 < at_random < 50 and what == ""
    run("grouped", *options, *GROUPED)
    grouped, _ = told_padding(capsys)
    assert 0 < grouped < at_random / 2
    run("one", *options, "--per_device_train_batch_size", "1")
    assert told_padding(capsys) == (0, "")
    run("free", *options, "--padding_free")
    assert told_padding(capsys) == (at_random, ", left out")


@pytest.mark.parametrize("strategy", ["random", "sequential", "batch_rebalance"])
def test_the_other_orders_have_their_share_told_too(run, capsys, strategy):
    run("out", "--max_steps", "1", "--train_sampling_strategy", strategy)
    assert told_padding(capsys)[0] > 0


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_run_grouped_by_length_goes_on_in_the_order_of_one_that_did_not_stop(run, tmp_path, step):
    run("whole", *GROUPED)
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("adapter_model.safetensors", "rosa_config.json", "config.json"):
        (cut / name).unlink()
    for checkpoint in cut.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    run("cut", "--resume", *GROUPED)
    whole, resumed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == resumed


@pytest.mark.parametrize("name", ["commonsense15k", "math10k"])
def test_the_papers_runs_keep_their_rows_in_random_order_and_padded(name):
    settings = load_settings(ROOT / "configs" / "paper" / f"{name}.yaml")
    assert not settings.keys() & {"train_sampling_strategy", "padding_free", "attn_implementation"}
    job, args = parse(["--model", "base", "--data", "rows.json", "--output", "out"])
    assert args.train_sampling_strategy == "random" and job.padding_free is False and job.attn_implementation is None
