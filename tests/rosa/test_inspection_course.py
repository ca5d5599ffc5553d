"""Layer selection in the Trainer's log, in what the log is reported to, and read back from a run's folder."""

import json
import shutil

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import rosa
from rosa.cli import main
from rosa.inspection.course import Course, read_course
from rosa.selection.algorithm import Selection
from rosa.selection.log import LogSelections, log_entry, read_entry

MADE = Selection(7, (1, 4), True, (0.5, 2.0, 0.25))


class Reported(TrainerCallback):
    """Keeps what the Trainer reports, as its integrations are told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.fixture
def make_trainer(make_patched, tmp_path, monkeypatch):
    monkeypatch.setenv("ROSA_BACKEND", "reference")

    def make(*, config=None, dls=None, callbacks=(), **arguments):
        rows = torch.randint(3, 96, (32, 9), generator=torch.Generator().manual_seed(5))
        options = dict(
            output_dir=str(tmp_path / "run"), max_steps=13, per_device_train_batch_size=2, save_steps=4,
            logging_steps=4, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True, seed=11,
        )  # fmt: skip
        return rosa.RosaTrainer(
            make_patched(config=config),
            TrainingArguments(**options | arguments),
            dls={"interval": 3, "p_exploit": 0.5} if dls is None else dls,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=list(callbacks),
        )

    return make


def test_an_entry_says_which_layers_were_chosen_and_how():
    entry = log_entry(MADE, (1, 2, 4))
    assert entry == {
        "dls/layers": 2, "dls/share": 2 / 3, "dls/exploited": 1, "dls/selected/1": 1, "dls/selected/2": 0,
        "dls/selected/4": 1, "dls/score/1": 0.5, "dls/score/2": 2.0, "dls/score/4": 0.25,
    }  # fmt: skip
    assert read_entry({"epoch": 0.1, "step": 7, **entry}) == (MADE, (1, 2, 4))
    assert read_entry({"epoch": 0.1, "step": 7, "loss": 0.5}) is None


def test_every_selection_reaches_whatever_the_trainer_reports_to(make_trainer):
    reported = Reported()
    trainer = make_trainer(callbacks=[reported])
    trainer.train()
    history = trainer.layer_selection.history
    assert len({made.exploited for made in history}) == 2  # both kinds
    told = [(step, logs) for step, logs in reported.logs if "dls/layers" in logs]
    assert [step for step, _ in told] == [made.step for made in history] == [3, 6, 9, 12]
    for (_, logs), made in zip(told, history, strict=True):
        assert {name: logs[name] for name in logs if name.startswith("dls/")} == log_entry(made, (0, 1, 2, 3))
        assert all(isinstance(logs[name], (int, float)) for name in logs)  # all that TensorBoard and W&B take


def test_tensorboard_shows_every_selection(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()

    def shown(name):
        return [(event.step, event.value) for event in events.Scalars(f"train/dls/{name}")]

    history = trainer.layer_selection.history
    assert shown("layers") == [(made.step, 2) for made in history]
    assert shown("share") == [(made.step, 0.5) for made in history]
    assert shown("exploited") == [(made.step, made.exploited) for made in history]
    for layer in range(4):
        assert shown(f"selected/{layer}") == [(made.step, layer in made.layers) for made in history]
        assert shown(f"score/{layer}") == [(made.step, pytest.approx(made.scores[layer])) for made in history]


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_a_finished_runs_course_is_its_selections(make_trainer, tmp_path, layers):
    trainer = make_trainer(config=rosa.RosaConfig(rank=4, layers=layers))
    trainer.train()
    trainer.save_state()
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    course = read_course(tmp_path / "run")
    assert course == Course(layers or (0, 1, 2, 3), 13, trainer.layer_selection.history)


def test_of_a_run_that_was_stopped_the_last_complete_checkpoint_counts(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-13")
    (tmp_path / "run" / "checkpoint-12" / "trainer_state.json").write_text("{")  # killed while it was written
    assert read_course(tmp_path / "run") == Course((0, 1, 2, 3), 8, trainer.layer_selection.history[:2])


def test_layers_are_counted_by_the_way_in_which_they_were_chosen():
    history = [MADE, Selection(9, (1, 2), False, MADE.scores), Selection(11, (1, 4), True, MADE.scores)]
    assert Course((1, 2, 4), 12, history).counts() == {1: (2, 1), 2: (0, 1), 4: (2, 0)}


def test_a_run_without_selections_is_an_error(make_trainer, tmp_path):
    trainer = make_trainer(dls={"interval": 40})
    trainer.train()
    trainer.save_state()
    with pytest.raises(ValueError, match="trainer_state.json logs no layer selection in 13 steps.*--dls false"):
        read_course(tmp_path / "run")
    assert any(isinstance(callback, LogSelections) for callback in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("config", [rosa.RoadConfig(), rosa.RosaConfig(rank=4)])
def test_a_run_of_road_is_told_that_it_chose_no_layers(make_trainer, tmp_path, config):
    trainer = make_trainer(config=config, dls={"interval": 40})
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    told = "the run trained RoAd, which has no layer selection unless --dls true"
    with pytest.raises(ValueError, match="the run trained ") as error:
        read_course(tmp_path / "run")
    assert (told in str(error.value)) == isinstance(config, rosa.RoadConfig)


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"log_history": []})])
def test_a_damaged_log_is_named(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match="trainer_state.json is not the state of a Trainer"):
        read_course(tmp_path)


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        read_course(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither trainer_state.json nor a complete checkpoint"):
        read_course(tmp_path)


SELECTION = {"step": 4, **log_entry(Selection(4, (1,), True, (0.5, 2.0)), (0, 1))}
WITHOUT_A_SCORE = {name: value for name, value in SELECTION.items() if name != "dls/score/1"}


@pytest.mark.parametrize(
    "state",
    [
        "[" * 100_000,
        "5",
        "null",
        json.dumps({"global_step": 8}),
        json.dumps({"global_step": None, "log_history": [SELECTION]}),
        json.dumps({"global_step": 8, "log_history": 5}),
        json.dumps({"global_step": 8, "log_history": [5, SELECTION]}),
        json.dumps({"global_step": 8, "log_history": [SELECTION | {"step": None}]}),
        json.dumps({"global_step": 8, "log_history": [SELECTION | {"dls/score/0": "much"}]}),
        json.dumps({"global_step": 8, "log_history": [SELECTION | {"dls/selected/\u00b2": 1}]}),
        json.dumps({"global_step": 8, "log_history": [WITHOUT_A_SCORE]}),
        json.dumps({"global_step": float("inf"), "log_history": [SELECTION]}),
        json.dumps({"global_step": 8, "log_history": [SELECTION, SELECTION | {"dls/selected/7": 1, "dls/score/7": 1}]}),
    ],
)
def test_a_damaged_log_is_told_in_one_line(tmp_path, state, capsys):
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", "--run", str(tmp_path), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "trainer_state.json" in error
    assert not (tmp_path / "out").exists()
