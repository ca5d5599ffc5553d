"""RosaTrainer: the real Trainer on a tiny model, its checkpoints, its logs, and its stop at a broken loss."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments

import rosa
from rosa.training.resuming import checkpoints, last_checkpoint, unsaved_told
from rosa.training.selective_trainer import SelectiveTrainer
from tests.rosa.tiny_qwen2 import tiny_tokenizer


@pytest.fixture
def make_trainer(make_patched, tmp_path):
    def make(output="run", steps=12, *, dls=None, model=None, **options):
        model = make_patched() if model is None else model
        rows = torch.randint(3, 96, (32, 9), generator=torch.Generator().manual_seed(5))
        data = [{"input_ids": row, "labels": row} for row in rows]
        arguments = dict(
            output_dir=str(tmp_path / output), max_steps=steps, per_device_train_batch_size=2, save_steps=4,
            logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True,
            gradient_accumulation_steps=2, lr_scheduler_type="cosine", seed=11,
        )  # fmt: skip
        options = {"train_dataset": data} | options
        arguments |= options.pop("arguments", {})
        dls = dls if dls == "auto" else {"interval": 5, **(dls or {})}
        return rosa.RosaTrainer(model, TrainingArguments(**arguments), dls=dls, **options)

    return make


@pytest.fixture
def make_road(make_model):
    """A model with RoAd."""
    return lambda **config: rosa.patch(make_model(), rosa.RoadConfig(**config))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_falls_and_only_the_adapter_moves(make_trainer):
    trainer = make_trainer(steps=30)
    before = values(trainer.model)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    after = values(trainer.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trainable
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("dls", [{}, {"mode": "mask"}])
def test_the_norms_can_have_a_learning_rate_of_their_own(make_trainer, dls):
    trainer = make_trainer(steps=4, dls=dls, norm_learning_rate=0.1, arguments={"lr_scheduler_type": "linear"})
    before = values(trainer.model)
    trainer.train()
    moved = {name: (value - before[name]).abs().max() for name, value in values(trainer.model).items()}
    norms = {name for name in moved if "layernorm" in name}
    assert len(norms) == 8
    # Adam's steps are as large as its rate: together 2.5 times the first.
    assert all(0.1 < moved[name] < 0.3 for name in norms)
    assert all(moved[name] < 0.03 for name in moved.keys() - norms)
    assert trainer.state.log_history[0]["learning_rate"] == 1e-2
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0, 0]


def test_a_run_with_two_learning_rates_resumes_to_the_same(make_trainer, tmp_path, make_patched):
    whole = make_trainer(norm_learning_rate=0.1)
    whole.train()
    resumed = make_trainer(norm_learning_rate=0.1, model=make_patched())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert equal(values(whole.model), values(resumed.model))


def test_a_learning_rate_of_norms_that_do_not_train_is_an_error(make_trainer, make_patched):
    trainer = make_trainer(
        norm_learning_rate=0.1, model=make_patched(config=rosa.RosaConfig(rank=4, train_norms=False))
    )
    with pytest.raises(ValueError, match="norm_learning_rate is 0.1, but no norm of the decoder layers trains"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match="norm_learning_rate must be a number above 0, got nan"):
        make_trainer(norm_learning_rate=float("nan"))


def test_road_trains_every_layer_unless_told_otherwise(make_trainer, make_road):
    trainer = make_trainer(steps=30, dls="auto", model=make_road())
    before = values(trainer.model)
    trainer.train()
    assert trainer.layer_selection is None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    moved = {name for name, value in values(trainer.model).items() if not torch.equal(before[name], value)}
    assert moved == {name for name in before if ".road." in name}


@pytest.mark.parametrize(
    ("config", "dls", "score"),
    [
        ({}, {}, "adapter"),
        ({"train_norms": True}, {}, "norms"),
        ({}, {"score": "norms"}, "norms"),
        (None, "auto", "norms"),
    ],
)
def test_what_ranks_the_layers_of_an_adapter(make_trainer, make_road, config, dls, score):
    trainer = make_trainer(dls=dls, model=None if config is None else make_road(**config))
    trainer.create_optimizer()
    assert trainer.layer_selection.score == score


def test_a_word_that_says_nothing_of_layer_selection_is_an_error(make_road, tmp_path):
    with pytest.raises(ValueError, match="dls must be arguments of DynamicLayerSelection, None or \"auto\", got 'off'"):
        rosa.RosaTrainer(make_road(), TrainingArguments(str(tmp_path), report_to=[]), dls="off")


@pytest.mark.parametrize("dls", ["auto", {}])
def test_a_resumed_run_of_road_ends_bitwise_as_one_that_did_not_stop(make_trainer, make_road, dls):
    straight = make_trainer("straight", dls=dls, model=make_road(variant=4))
    straight.train()
    stopped = make_trainer("stopped", dls=dls, model=make_road(variant=4))
    stopped.add_callback(After(9, lambda control: setattr(control, "should_training_stop", True)))
    stopped.train()
    resumed = make_trainer("stopped", dls=dls, model=make_road(variant=4))
    resumed.train(resume_from_checkpoint=True)
    assert equal(values(straight.model), values(resumed.model))
    assert dls == "auto" or straight.layer_selection.history == resumed.layer_selection.history != []


def test_selections_are_logged(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == list(range(1, 13))
    logged = [entry for entry in trainer.state.log_history if "dls/layers" in entry]
    assert [entry["step"] for entry in logged] == [5, 10] == [s.step for s in trainer.layer_selection.history]
    for entry, selection in zip(logged, trainer.layer_selection.history, strict=True):
        assert entry["dls/layers"] == len(selection.layers) == 2
        assert tuple(entry[f"dls/score/{i}"] for i in range(4)) == selection.scores
        assert tuple(i for i in range(4) if entry[f"dls/selected/{i}"]) == selection.layers
        assert entry["dls/exploited"] == selection.exploited


def test_selections_are_logged_in_a_second_training_too(make_trainer):
    trainer = make_trainer(dls={"interval": 5})
    trainer.train()
    trainer.train()  # Trainer counts its steps anew, layer selection does not
    made = [s.step for s in trainer.layer_selection.history]
    assert made == [5, 10, 15, 20]
    assert [e["step"] for e in trainer.state.log_history if "dls/layers" in e] == [3, 8]


def test_a_model_that_is_made_anew_is_trained_under_a_selection_of_its_own(make_model, tmp_path):
    def model_init():
        return get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))

    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 4
    arguments = dict(max_steps=4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
    arguments = TrainingArguments(str(tmp_path), **arguments)
    trainer = SelectiveTrainer(args=arguments, dls={"interval": 2}, model_init=model_init, train_dataset=rows)
    trainer.train()
    first = trainer.layer_selection
    trainer.train()
    assert trainer.layer_selection is not first
    assert trainer.layer_selection.history == first.history != []


def test_layers_that_a_loop_of_the_users_left_frozen_train_again(make_trainer, make_patched, batch):
    model = make_patched().train()
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model))
    own = rosa.DynamicLayerSelection(adamw, model, interval=2, k_ratio=0.25)
    for _ in range(2):
        model(**batch).loss.backward()
        own.step()
    trainer = make_trainer(model=model)
    trainer.create_optimizer()
    assert trainer.layer_selection.num_layers == 4


def test_checkpoints_hold_the_adapter_and_not_the_base(make_trainer, tmp_path):
    make_trainer(steps=4).train()
    files = set(os.listdir(tmp_path / "run" / "checkpoint-4"))
    assert {"adapter_model.safetensors", "rosa_config.json", "optimizer.pt", "trainer_state.json"} <= files
    assert not any(name.startswith(("model", "pytorch_model")) for name in files)


@pytest.mark.parametrize("dls", [{}, {"mode": "mask"}])
def test_a_resumed_run_ends_bitwise_as_one_that_did_not_stop(make_trainer, dls):
    straight = make_trainer("straight", dls=dls)
    straight.train()
    stopped = make_trainer("stopped", dls=dls)
    stopped.add_callback(After(9, lambda control: setattr(control, "should_training_stop", True)))
    stopped.train()
    resumed = make_trainer("stopped", dls=dls)
    resumed.train(resume_from_checkpoint=True)
    assert equal(values(straight.model), values(resumed.model))
    assert straight.layer_selection.history == resumed.layer_selection.history
    logged = [[e["step"] for e in t.state.log_history if "dls/layers" in e] for t in (straight, resumed)]
    assert logged == [[5, 10], [5, 10]]  # a selection from before the checkpoint is not logged again


class After(TrainerCallback):
    """Calls `act(control)` after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


class Before(TrainerCallback):
    """Calls `act()` before the optimizer makes a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.act()


@pytest.mark.parametrize("bound", [1e-5, 0], ids=["clipped", "measured"])
def test_norms_that_serve_the_score_alone_take_no_part_in_clipping(make_trainer, make_patched, bound):
    frozen = make_patched(config=rosa.RosaConfig(rank=4, train_norms=False))
    trainer = make_trainer(steps=2, dls={"interval": 1}, model=frozen, arguments={"max_grad_norm": bound})
    trained, seen = rosa.trainable_parameters(frozen), []
    trainer.add_callback(Before(2, lambda: seen.append(torch.nn.utils.get_total_norm([p.grad for p in trained]))))
    trainer.train()
    assert len(trainer.layer_selection.history) == 2
    told = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry][1]
    assert told > bound and seen[0].item() == pytest.approx(bound or told, rel=0.05)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_the_same_and_backward_stops_early(make_trainer, reentrant):
    plain = make_trainer("plain")
    plain.train()
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    trainer = make_trainer("checkpointed", arguments=options)
    seen = set()
    trainer.model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.add(args[0].requires_grad))
    trainer.train()
    assert equal(values(plain.model), values(trainer.model))
    assert seen == {reentrant}  # only reentrant checkpoints need gradients at the lowest layer's input


@pytest.mark.parametrize("road", [False, True])
def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer, make_road, road):
    best = dict(eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, learning_rate=0.5)
    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}]
    trainer = make_trainer(arguments=best, eval_dataset=rows, model=make_road() if road else None)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert min(losses.values()) == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert min(losses.values()) < losses[12]


def test_without_selection_every_layer_trains(make_patched, tmp_path):
    trainer = rosa.RosaTrainer(make_patched(), TrainingArguments(str(tmp_path), report_to=[]), dls=None)
    trainer.create_optimizer()
    assert isinstance(trainer.optimizer, torch.optim.AdamW) and trainer.layer_selection is None


def test_an_optimizer_of_the_users_is_wrapped(make_trainer, make_patched):
    model = make_patched()
    sgd = torch.optim.SGD(rosa.trainable_parameters(model), lr=0.1)
    trainer = make_trainer(model=model, optimizers=(sgd, None))
    trainer.train()
    assert trainer.layer_selection.optimizer is sgd and len(trainer.layer_selection.history) == 2


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.add_callback(After(6, lambda _: torch.nn.init.constant_(trainer.model.lm_head.weight, float("nan"))))
    with pytest.raises(FloatingPointError, match=r"the loss is nan in step 7.*last checkpoint stays"):
        trainer.train()
    assert os.listdir(tmp_path / "run") == ["checkpoint-4"]
    assert all(torch.isfinite(p).all() for p in rosa.trainable_parameters(trainer.model))


def test_parameters_that_the_last_step_broke_are_not_saved(make_trainer, tmp_path):
    constant = dict(lr_scheduler_type="constant")
    trainer = make_trainer(steps=4, arguments=constant | {"save_steps": 3})
    trainer.add_callback(Before(4, lambda: trainer.optimizer.param_groups[0].update(lr=float("inf"))))
    with pytest.raises(FloatingPointError, match=r"parameters are no longer finite after step 4.*checkpoint stays"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
    # Without a checkpoint due it is found when training ends.
    trainer = make_trainer("unsaved", steps=4, arguments=constant | {"save_strategy": "no"})
    trainer.add_callback(Before(4, lambda: trainer.optimizer.param_groups[0].update(lr=float("inf"))))
    with pytest.raises(FloatingPointError, match="after step 4"):
        trainer.train()


def test_speed_is_of_the_steps_of_this_process_alone(make_trainer):
    counted = dict(include_num_input_tokens_seen="all")
    whole = make_trainer(arguments=counted)
    assert whole.tokens_per_second is None
    whole.train()
    resumed = make_trainer(arguments=counted, steps=13)
    resumed.train(resume_from_checkpoint=True)
    assert (whole.state.num_input_tokens_seen, resumed.state.num_input_tokens_seen) == (12 * 36, 13 * 36)
    assert resumed.speed.tokens == 36  # a step of two times two rows of nine
    assert resumed.tokens_per_second == 36 / resumed.speed.seconds
    last = [entry for entry in resumed.state.log_history if "train_tokens_per_second" in entry][-1]
    assert last["train_tokens_per_second"] * last["train_runtime"] == pytest.approx(36, rel=0.1)
    end = resumed.state.log_history[-1]
    assert end["train_samples_per_second"] == pytest.approx(4 * end["train_steps_per_second"], rel=0.1)


def test_a_finished_run_that_is_resumed_makes_no_step_more(make_trainer):
    make_trainer(steps=10, arguments={"save_steps": 10}).train()  # within the second epoch of eight
    resumed = make_trainer(steps=10, arguments={"save_steps": 10})
    before = resumed.optimizer
    resumed.train(resume_from_checkpoint=True)
    assert before is None and resumed.state.global_step == 10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "checkpoint-12: optimizer.pt is missing"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "checkpoint-12: scheduler.pt is missing"),
        (
            lambda folder: cut(folder / "optimizer.pt"),
            "checkpoint-12: optimizer.pt is cut short",
        ),
        (
            lambda folder: cut(folder / "trainer_state.json"),
            "checkpoint-12: trainer_state.json is missing or",
        ),
    ],
)
def test_a_checkpoint_without_the_state_of_training_is_not_complete(make_trainer, tmp_path, spoil, message):
    make_trainer().train()
    run = tmp_path / "run"
    spoil(run / "checkpoint-12")
    with pytest.raises(ValueError, match=f"training cannot go on from .*{message}"):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-12"))
    assert last_checkpoint(run) == str(run / "checkpoint-8")


def test_no_checkpoint_of_save_only_model_is_complete(make_trainer, tmp_path):
    make_trainer(arguments={"save_only_model": True}).train()
    assert last_checkpoint(tmp_path / "run") is None


def test_state_that_is_damaged_within_is_named(make_trainer, tmp_path):
    make_trainer(steps=8).train()
    for name, message in (("optimizer.pt", r"optimizer\.pt or scheduler\.pt"), ("rng_state.pth", r"rng_state\*\.pth")):
        file = tmp_path / "run" / "checkpoint-8" / name
        content = file.read_bytes()
        file.write_bytes(content[:200] + bytes(len(content) - 400) + content[-200:])
        with pytest.raises(ValueError, match=rf"{message} in .*checkpoint-8 cannot be loaded"):
            make_trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
        file.write_bytes(content)


def test_only_numbered_folders_are_checkpoints_and_the_highest_number_is_the_last(make_trainer, tmp_path):
    make_trainer().train()
    run = tmp_path / "run"
    for name in ("checkpoint-old-900", "checkpoint-\u00b2", "checkpoint-\u0664\u0662", "checkpoint-99.bak"):
        shutil.copytree(run / "checkpoint-4", run / name)
    (run / "checkpoint-1000").write_text("a file")
    assert last_checkpoint(run) == str(run / "checkpoint-12")
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_and_names_it(make_trainer, tmp_path):
    trainer = make_trainer()
    size = 4096

    def fill_the_disk(control):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.add_callback(After(8, fill_the_disk))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large is then an error, as on a full disk
    try:
        with pytest.raises(OSError, match=r"checkpoint-8 could not be saved.*; .*checkpoint-4 stands: --resume"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-4")


@pytest.mark.parametrize("writes", ["pytorch", "safetensors", "tokenizers"])
def test_every_library_that_cannot_write_is_understood(tmp_path, writes, tiny=64 * 1024):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokenizer = tiny_tokenizer([str(number) for number in range(3000)], vocab_size=2000)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write = {
        "pytorch": lambda: torch.save(torch.zeros(tiny), tmp_path / "a.pt"),
        "safetensors": lambda: save_file({"a": torch.zeros(tiny)}, tmp_path / "a.safetensors"),
        "tokenizers": lambda: tokenizer.save_pretrained(tmp_path),
    }[writes]
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="out could not be saved .*; there is no checkpoint"):  # noqa: SIM117
            with unsaved_told(tmp_path / "out", tmp_path):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_cut_short_is_passed_over(make_trainer, tmp_path):
    make_trainer().train()
    run = tmp_path / "run"
    assert last_checkpoint(run) == str(run / "checkpoint-12")
    state = (run / "checkpoint-12" / "trainer_state.json").read_text()
    (run / "checkpoint-12" / "trainer_state.json").write_text(state[: len(state) // 2])
    assert last_checkpoint(run) == str(run / "checkpoint-8")
    (run / "checkpoint-8" / "trainer_state.json").unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-4")
    assert json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_nothing_to_resume_from_and_nothing_patched(make_trainer, make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="run holds no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="call rosa.patch on this Qwen2ForCausalLM first"):
        rosa.RosaTrainer(make_model(), TrainingArguments(str(tmp_path), report_to=[]))
