"""Layers that pay: rules choose as they say, operations are those that are counted, a run is kept and goes on."""

import json
from typing import ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import rosa
from benchmarks.document import fill
from benchmarks.smollm2 import layer_choice, layer_report
from benchmarks.smollm2.layer_report import Run
from benchmarks.smollm2.layer_rules import RULES
from benchmarks.smollm2.step_flops import Batch, step_flops
from rosa.selection.algorithm import Selection, Selector
from tests.rosa.tiny_qwen2 import tiny_tokenizer

ROWS = [{"instruction": f"Add {'one and ' * (i % 3)}{i}.", "output": "ten " * (i % 4) + str(i)} for i in range(24)]


def tiny_llama(vocabulary=256, layers=4):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, attn_implementation="eager", eos_token_id=0,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_the_document_has_the_tables_that_formulas_and_runs_make():
    text = layer_report.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, layer_report.parts()), "run `python -m benchmarks.smollm2.layer_choice --report`"


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ("paper", (0, 1)),
        ("by_cost", (3, 5)),  # 9/6, 8/5, 1/4, 6/3, 1/2, 6/1
        ("relative", (2, 4)),  # each in units of its own mean: 0.9, 0.8, 4, 1, 2, 1.5
        ("block", (0, 1)),  # sums: 17, 9, 7, 7, 7
        ("block_by_cost", (4, 5)),  # the same for 6, 5, 4, 3, 2: 7/2 is the most
    ],
)
def test_a_rule_chooses_layers(rule, chosen):
    scores, costs = (9.0, 8.0, 1.0, 6.0, 1.0, 6.0), (6, 5, 4, 3, 2, 1)
    make = RULES[rule].priorities
    selector = Selector(tuple(range(6)), 1 / 3, 1, 0, 1.0, 0, make and make(costs, 2))
    for earlier in ((5.0, 10.0, 0.25, 6.0, 0.25, 2.0), (15.0, 10.0, 0.25, 6.0, 0.75, 6.0)):
        selector.adopt(Selection(1, (0, 1), True, earlier))
    assert selector.choose(tuple(range(6)), scores).layers == chosen


def test_a_block_by_cost_weighs_its_lowest_layer():
    worth = RULES["block_by_cost"].priorities((6, 5, 4, 3, 2, 1), 2)([], (9.0, 8.0, 1.0, 6.0, 1.0, 0.0))
    assert worth == [1, 1, 0, 0, 0, 0]  # 17/6 is more than 9/5, 7/4, 7/3 and 1/2


def test_the_first_selection_by_relative_score_is_the_papers():
    scores = (3.0, 1.0, 2.0)
    assert RULES["relative"].priorities((3, 2, 1), 1)([], scores) == scores


def test_every_rule_draws_the_same_layers_where_it_draws():
    made = [rule.priorities and rule.priorities((3, 2, 1), 1) for rule in RULES.values()]
    drawn = [Selector((0, 1, 2), 0.34, 1, 0, 0.0, 7, each).choose((0, 1, 2), (3.0, 2.0, 1.0)).layers for each in made]
    assert len(set(drawn)) == 1


class Watched(layer_choice.CountingTrainer):
    """Notes what a counter of torch sees of each step, and what the formula says."""

    seen: ClassVar[list] = []
    stop_after: ClassVar[int | None] = None

    def training_step(self, model, inputs, *args, **kwargs):
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        with FlopCounterMode(display=False) as counter:
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.seen.append((counter.get_total_flops(), self.floating_point_ops(inputs)))
        return loss


@pytest.mark.parametrize(("adapted", "chosen"), [(None, None), ([2, 3], None), (None, [1, 3]), (None, [2])])
def test_operations_are_those_that_are_counted(tmp_path, adapted, chosen):
    model = rosa.patch(tiny_llama(), rosa.RosaConfig(layers=adapted, rank=8, r_low=0.5))
    rows = [{"input_ids": list(range(9)), "labels": [-100] * 4 + list(range(5))} for _ in range(6)]
    dls = chosen and {
        "k_ratio": len(chosen) / 4, "interval": 2, "p_exploit": 1.0,
        "priorities": lambda history, scores: [float(i in chosen) for i in range(4)],
    }  # fmt: skip
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = Watched(model, args, dls=dls, train_dataset=rows)
    Watched.seen.clear()
    trainer.train()
    (_, first), *others = Watched.seen  # the first step tries out more than it trains on
    assert all(counted == formula for counted, formula in others)
    assert others[1][1] < others[0][1] if chosen else others[1][1] == others[0][1]  # step 2 selects, 3 skips
    assert trainer.state.total_flos == first + sum(formula for _, formula in others)


def test_costs_are_those_of_backward_down_to_each_layer():
    products = step_flops(rosa.patch(tiny_llama(), rosa.RosaConfig(rank=8)))
    batch = Batch(2, 10, 6)
    costs = products.costs(batch)
    assert costs == sorted(costs, reverse=True) and len(costs) == 4
    assert costs[3] < products.forward(batch) < costs[0]


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A tiny base, its rows, and the options by which `run` takes them."""
    monkeypatch.setattr(layer_choice, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(layer_report, "KEPT", tmp_path / "kept")
    for name, value in (("INTERVAL", 2), ("DECAY", 2)):
        monkeypatch.setattr(layer_choice, name, value)
    monkeypatch.setattr(layer_report, "STEPS", 6)
    tokenizer = tiny_tokenizer(row["instruction"] for row in ROWS)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    every = {"eval_steps": 2, "save_steps": 2, "logging_steps": 100}
    fast = {"val_size": 4, "bf16": "false", "rank": 8}
    return {"model": tmp_path / "base", "data": tmp_path / "rows.json", **every, **fast}


def test_a_run_is_kept_and_goes_on_as_if_it_had_not_stopped(small_study, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_choice, "CountingTrainer", Watched)
    Watched.seen.clear()
    Watched.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        layer_choice.run("arithmetic", "block_by_cost", 1, **small_study)
    assert layer_report.steps_made("arithmetic", "block_by_cost", 1) == 4
    Watched.stop_after = None
    layer_choice.run("arithmetic", "block_by_cost", 1, **small_study)
    assert len(Watched.seen) == 5 + 2  # from step 4 on
    stopped = layer_report.read_run("arithmetic", "block_by_cost", 1)
    monkeypatch.setattr(layer_choice, "CHECKPOINTS", tmp_path / "other")
    layer_choice.run("arithmetic", "block_by_cost", 1, **small_study)
    assert layer_report.read_run("arithmetic", "block_by_cost", 1) == stopped
    assert [made["step"] for made in stopped.selections] == [2, 4, 6]
    assert stopped.last["flops"] == sum(flops for _, flops in Watched.seen[-6:])
    assert all(made["layers"][1] == made["layers"][0] + 1 for made in stopped.selections if made["exploited"])


def test_the_upper_half_costs_less_than_all_layers(small_study):
    for rule in ("all", "upper"):
        layer_choice.run("arithmetic", rule, 1, **small_study)
    every, upper = layer_report.kept_groups()[0]
    assert upper.last["flops"] < 0.9 * every.last["flops"] and not upper.selections


def test_a_checkpoint_of_other_settings_is_refused(small_study):
    layer_choice.run("arithmetic", "paper", 1, **small_study)
    with pytest.raises(ValueError, match="checkpoint-6 was made with other settings: learning_rate was 0.003, now 0.1"):
        layer_choice.run("arithmetic", "paper", 1, **small_study, learning_rate=0.1)


def test_a_table_and_a_picture_tell_the_ends_apart_from_what_comes_before_the_rate_falls():
    def run(rule, *points):
        return Run("arithmetic", rule, 1, [{"step": s, "flops": f * 1e12, "loss": y} for s, f, y in points], [])

    group = [
        run("all", (50, 4, 0.9), (100, 8, 0.7)),
        run("upper_longer", (50, 3, 0.8), (133, 7, 0.65)),
        run("block", (50, 4, 0.85), (75, 6, 0.6)),
    ]
    _, _, every, upper, unfinished = layer_report.table([group]).splitlines()
    assert every.split("|")[4:-1] == [" 0.9000 ", " 4.0 ", " 100 ", " 0.7000 ", " 8.0 ", " 100% ", " 0.53: - "]
    assert upper.split("|")[3:-1] == [" 15.0 ", " 0.8000 ", " 3.0 ", " 133 ", " 0.6500 ", " 7.0 ", " 88% ", " 0.53: - "]
    assert unfinished.split("|")[4:-1] == [" 0.8500 ", " 4.0 ", " 100 ", "  ", "  ", "  ", " 0.53: - "]
    higher = [run("all", (50, 4, 1.9), (100, 8, 1.7))]
    figure = layer_report.picture([group, higher])
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [RULES[rule].title for rule in ("all", "upper_longer", "block")]  # each once
    left, right = (panel.get_ylim() for panel in figure.axes)
    assert left == right and left[0] < 0.6 and left[1] > 1.9


@pytest.mark.parametrize(
    ("losses", "operations"),
    [
        ((0.9, 0.7, 0.4), 25.0),  # half way from 0.7 to 0.4 is 0.55
        ((0.9, 0.5, 0.6, 0.4), 18.75),  # the first time
        ((0.9, 0.55), 20.0),
        ((0.9, 0.6), None),
        ((0.5, 0.4), None),  # before anything was measured
        ((0.5, 0.6, 0.4), None),
    ],
)
def test_operations_until_a_loss_lie_on_the_line_between_two_evaluations(losses, operations):
    run = Run("arithmetic", "all", 1, [{"step": n, "flops": 10.0 * n, "loss": y} for n, y in enumerate(losses, 1)], [])
    assert run.flops_to(0.55) == (operations and pytest.approx(operations))
    assert ("<" in layer_report._until(run, 0.55)) == (losses[0] < 0.55)
