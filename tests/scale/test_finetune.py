"""RosaTrainer in two processes: its checkpoints, from any engine to any other, and what remains when a rank fails."""

import json

import pytest
import torch

import rosa
from rosa.training.resuming import last_checkpoint
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer
from tests.scale.finetune import STEPS, make, make_trainer, values

CPU_BUILD = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="fully_shard would take to the GPU by itself")


METHODS = ("rosa", "road")  # with layer selection, and without


@pytest.fixture(scope="module")
def relay(launch, tmp_path_factory):
    """Of each method one run in three parts, of DDP, FSDP2 and a single process, each resumed from the last one's
    checkpoint: its folder, and what the ranks of the first two made."""
    folder = tmp_path_factory.mktemp("relay")
    made = {method: {} for method in METHODS}
    for launcher, options in (("torchrun", dict(stop_at=6)), ("fsdp2", dict(stop_at=9, resume=True))):
        status, output = launch(launcher, "finetune.py", folder, json.dumps(options | {"methods": METHODS}))
        assert status == 0, output[-4000:]
        for method in METHODS:
            files = [folder / method / f"rank{rank}.pt" for rank in (0, 1)]
            made[method][launcher] = [torch.load(file, weights_only=False) for file in files]
    return {method: (folder / method, made[method]) for method in METHODS}


@CPU_BUILD
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_under_any_other_engine(relay, tmp_path, method):
    folder, made = relay[method]
    assert [made[launcher][0]["engine"] for launcher in made] == ["DistributedType.MULTI_CPU", "DistributedType.FSDP"]
    straight, resumed = make_trainer(tmp_path, method=method), make_trainer(folder, method=method)
    straight.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    if method == "rosa":
        assert [s[:3] for s in resumed.layer_selection.history] == [s[:3] for s in straight.layer_selection.history]
    ours, theirs = values(resumed), values(straight)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11)
    ordinary = make_trainer(tmp_path / "ordinary", method=method, response_logits=False)
    ordinary.train()
    for name, value in values(ordinary).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)  # transformers' loss is in float32
    start = values(make_trainer(tmp_path, method=method))
    assert not any(torch.equal(theirs[name], start[name]) for name in theirs if ".road." in name)
    assert not all(torch.equal(theirs[name], start[name]) for name in theirs)


@CPU_BUILD
@pytest.mark.parametrize("method", METHODS)
def test_each_rank_computes_the_logits_of_its_responses_alone(relay, method):
    for ranks in relay[method][1].values():
        rows = [rank["logits"] for rank in ranks]
        assert rows[0] != rows[1] and max(map(max, rows)) <= 2 * 7 + 1


@CPU_BUILD
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_sharded_models_hold_the_whole_adapter_and_no_base(relay, method):
    folder, made = relay[method]
    checkpoints = {step: {file.name for file in (folder / f"checkpoint-{step}").iterdir()} for step in (6, 9)}
    assert checkpoints[6] == checkpoints[9]
    fresh = rosa.load_adapter(make(method), folder / "checkpoint-9")
    loaded = dict(fresh.named_parameters())
    for rank in made["fsdp2"]:
        for name, value in rank["values"].items():
            assert torch.equal(loaded[name], value)


def test_rosa_train_in_two_processes_saves_once_and_goes_on(launch, tmp_path):
    rows = [{"instruction": f"Say {i % 16}.", "output": f"It is {i % 16}."} for i in range(32)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tokenizer = tiny_tokenizer(row["instruction"] + row["output"] for row in rows)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "base")
    options = {"model": tmp_path / "base", "data": tmp_path / "rows.json", "output": tmp_path / "out", "rank": 4}
    options |= {"save_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "use_cpu": True}
    options |= {"logging_steps": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    for steps, said in ((2, "trainable params"), (4, f"resuming from {tmp_path / 'out' / 'checkpoint-2'}")):
        status, output = launch("torchrun", "rosa", "train", *words, "--max_steps", steps, "--resume")
        assert status == 0, output[-4000:]
        assert output.count("adapter saved in") == output.count(said) == output.count("ask it  ") == 1
        assert output.count("  loss ") == 2  # a line for each step, of one process
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-4")
    status, output = launch("torchrun", "rosa", "train", *words, "--max_steps", 6, "--resume", "--seed", 7)
    assert status != 0 and "rosa train: error:" in output and "seed was 42, now 7" in output


def test_a_rank_that_dies_ends_the_others_and_the_last_checkpoint_loads(launch, tmp_path):
    status, output = launch("torchrun", "finetune.py", tmp_path, json.dumps(dict(die_at=7)))
    assert status != 0 and "SIGKILL" in output
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS


def test_a_broken_loss_on_one_rank_stops_all_before_they_save(launch, tmp_path):
    options = dict(poison_at=8, save_steps=3)  # the ninth step, after which a checkpoint would be due
    status, output = launch("torchrun", "finetune.py", tmp_path, json.dumps(options))
    assert status != 0
    for rank in (0, 1):
        assert f"rank {rank}: FloatingPointError: the loss is [" in output
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
