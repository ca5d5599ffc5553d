"""RosaTrainer: the real Trainer on a tiny model, its checkpoints, its logs, and its stop at a broken loss."""

import json
import os

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import rosa
from rosa.trainer import last_checkpoint


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
        return rosa.RosaTrainer(model, TrainingArguments(**arguments), dls={"interval": 5, **(dls or {})}, **options)

    return make


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
    with pytest.raises(ValueError, match="norm_learning_rate must be above 0, got 0"):
        make_trainer(norm_learning_rate=0)


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


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer, tmp_path):
    best = dict(eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, learning_rate=0.5)
    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}]
    trainer = make_trainer(arguments=best, eval_dataset=rows)
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
