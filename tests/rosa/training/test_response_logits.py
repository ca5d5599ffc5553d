"""Logits of the response alone: the same training as with all logits, for every kind of output layer and batch."""

import functools
import json
import warnings

import pytest
import torch
from liger_kernel.transformers import functional
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import rosa
from rosa.training.finetune import finetune
from rosa.training.parsing import parse
from rosa.training.selective_trainer import SelectiveTrainer
from tests.rosa import families
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

LENGTHS = [(3, 9), (7, 12), (2, 4), (5, 11), (1, 6), (6, 7), (4, 12), (3, 5)]  # of prompts, and of all


class Watch(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self, model):
        self.model, self.gradients = model, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})


def rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    made = []
    for prompt, length in lengths:
        ids = torch.randint(3, 96, (length,), generator=generator)
        made.append({"input_ids": ids, "labels": torch.where(torch.arange(length) < prompt, -100, ids)})
    return made


def pad(batch):
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)
        for name, value in (("input_ids", 0), ("labels", -100))
    )
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def pack(batch):
    """One row of them all, without padding."""
    labels = [torch.cat([torch.tensor([-100]), row["labels"][1:]]) for row in batch]
    places = [torch.arange(len(row["input_ids"])) for row in batch]
    ids = [row["input_ids"] for row in batch]
    parts = {"input_ids": ids, "labels": labels, "position_ids": places}
    return {name: torch.cat(part)[None] for name, part in parts.items()}


def with_more(batch):
    made = pad(batch)
    return made | {"token_type_ids": torch.zeros_like(made["input_ids"])}


def train(model, folder, *, trainer=SelectiveTrainer, data=None, **options):
    """Trains some steps: the trainer, the gradients of each, and the rows that the output layer was given."""
    arguments = dict(
        max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, report_to=[],
        logging_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    arguments = TrainingArguments(str(folder), **arguments | options.pop("arguments", {}))
    data = rows() if data is None else data
    made = trainer(model, arguments, train_dataset=data, **{"data_collator": pad} | options)
    watch, given = Watch(model), []
    made.add_callback(watch)
    head = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: given.append(args[0].shape[:-1].numel()) if torch.is_grad_enabled() else None
    )
    try:
        made.train()
    finally:
        head.remove()
    return made, watch.gradients, given


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def both(make, folder, **options):
    """Trains with the logits of the response, and with all, and compares: the rows of the output layer in each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="logits are computed at every position")
        ours, gradients, given = train(make(), folder, **options)
    theirs, expected, everything = train(make(), folder, **options | {"response_logits": False})
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-5, atol=1e-6)
    for step, ordinary in zip(gradients, expected, strict=True):
        assert step.keys() == ordinary.keys() != set()
        for name, gradient in ordinary.items():
            atol = 1e-5 * gradient.abs().max().item() + 1e-9
            torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=atol)
    assert len(given) == len(everything)
    return sum(given), sum(everything)


FAMILIES = {
    "qwen2": {},
    "llama": dict(tie_word_embeddings=True),
    "gemma2": dict(final_logit_softcapping=2.0),
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=3.0),
    "mixtral": dict(output_router_logits=True, router_aux_loss_coef=0.5),
    "gpt2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family, tmp_path):
    given, everything = both(lambda: families.make_model(family, **FAMILIES[family]), tmp_path)
    assert given < everything


def test_the_output_layer_is_given_the_positions_before_a_label_and_one_more(make_model, tmp_path):
    data = rows([(3, 9), (7, 12)])
    labels = pad(data)["labels"]
    for collate in (pad, pack):
        given, everything = both(make_model, tmp_path, data=data, data_collator=collate)
        assert given == 3 * (int((labels != -100).sum()) + 1) < everything


@pytest.mark.parametrize(
    "arguments",
    [
        dict(label_smoothing_factor=0.2),
        dict(gradient_checkpointing=True),
        dict(gradient_accumulation_steps=4, per_device_train_batch_size=1),
        dict(bf16=True),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_with_what_the_trainer_makes_of_the_loss(make_model, tmp_path, arguments):
    given, everything = both(make_model, tmp_path, arguments=arguments)
    assert given < everything


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU Liger's kernels run in the interpreter alone")
def test_with_ligers_fused_loss_which_never_has_logits(make_model, tmp_path, monkeypatch):
    fused, rows = functional.liger_fused_linear_cross_entropy, []

    def watched(hidden_states, *args, **kwargs):
        if torch.is_grad_enabled():
            rows.append(len(hidden_states))
        return fused(hidden_states, *args, **kwargs)

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", watched)
    arguments = dict(use_liger_kernel=True, liger_kernel_config=dict(rope=False, rms_norm=False, swiglu=False))
    assert both(make_model, tmp_path, arguments=arguments) == (0, 0)
    half = len(rows) // 2
    assert sum(rows[:half]) < sum(rows[half:])


def test_with_adapters_and_layer_selection(make_patched, tmp_path):
    given, everything = both(make_patched, tmp_path, trainer=rosa.RosaTrainer, dls=dict(interval=2))
    assert given < everything


def test_with_an_adapter_of_pefts_and_its_dropout_draws_the_same_numbers(make_model, tmp_path):
    def make():
        return get_peft_model(make_model(), LoraConfig(target_modules="all-linear", lora_dropout=0.3))

    given, everything = both(make, tmp_path)
    assert given < everything


def test_in_a_compiled_model_that_trains_twice(make_model, tmp_path):
    data = rows([(prompt, 9) for prompt, _ in LENGTHS])

    def twice(**options):
        trainer, _, given = train(make_model(num_hidden_layers=1), tmp_path, data=data, **options)
        once = losses(trainer)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        return once + losses(trainer), given

    torch._dynamo.reset()
    compiled, given = twice(arguments=dict(torch_compile=True, torch_compile_backend="eager"))
    eager, everything = twice(response_logits=False)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert 0 < sum(given) < sum(everything)


def test_a_batch_without_a_label_counts_as_it_would(make_model, tmp_path):
    data = [
        {**row, "labels": torch.full_like(row["labels"], -100)} if i % 4 < 2 else row for i, row in enumerate(rows())
    ]
    both(make_model, tmp_path, data=data, arguments=dict(per_device_train_batch_size=1))
    with pytest.raises(FloatingPointError, match="rows in which every label is masked"):
        train(make_model(), tmp_path, data=[{**data[0]}])


def test_evaluation_computes_all_logits_for_metrics_alone(make_model, tmp_path):
    """Its loss is the same either way."""
    seen, positions = [], []

    def metrics(predicted):
        seen.append(predicted.predictions.shape)
        return {}

    def note(found, module, args, output):
        if not module.training:
            found.add(tuple(output.shape[:2]))

    data = rows([(3, 12)] * 4)
    arguments = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)
    options = dict(data=data, eval_dataset=data, arguments=arguments)
    logs = []
    for more in (dict(compute_metrics=metrics), {}, dict(response_logits=False)):
        model, found = make_model(), set()
        model.lm_head.register_forward_hook(functools.partial(note, found))
        trainer, _, _ = train(model, tmp_path, **options, **more)
        positions.append(found)
        logs.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert seen == [(4, 12, 96)] * 3
    assert positions == [{(2, 12)}, {(1, 2 * 9 + 1)}, {(2, 12)}]  # of two rows, nine labels each
    for log in logs[:2]:
        torch.testing.assert_close(log, logs[2], rtol=1e-5, atol=0)


def loss_of_the_users(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().logsumexp(-1).sum() / num_items_in_batch


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("xlnet", dict(dtype=torch.bfloat16), "a loss in torch.bfloat16 does not tell"),  # and is not shifted either
        ("mbart", {}, "the loss would be another"),  # its labels are not shifted
        ("llama4_text", {}, "the model does not take it .AttributeError"),  # does not tell its decoder
        ("llama", dict(data_collator=with_more), "a batch has token_type_ids beside its text"),
        ("llama", dict(compute_loss_func=loss_of_the_users), "compute_loss_func may read any of them"),
    ],
)
def test_where_it_does_not_fit_all_logits_are_computed_and_it_is_said_once(tmp_path, family, options, reason):
    dtype = options.get("dtype", torch.float32)
    options = {name: option for name, option in options.items() if name != "dtype"}

    def run(**more):
        return train(families.make_model(family).to(dtype), tmp_path, **options, **more)

    with pytest.warns(UserWarning, match=f"logits are computed at every position.*{reason}") as warned:
        ours, gradients, given = run()
    assert sum("at every position" in str(w.message) for w in warned) == 1
    theirs, expected, everything = run(response_logits=False)
    assert given == everything and losses(ours) == losses(theirs)
    for step, ordinary in zip(gradients, expected, strict=True):
        assert all(torch.equal(step[name], ordinary[name]) for name in ordinary)


def test_nothing_of_the_model_is_left_changed(make_model, tmp_path):
    def hooks(model):
        return [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]

    model = make_model()
    before = hooks(model)
    trainer, _, _ = train(model, tmp_path)
    assert hooks(model) == before
    batch = pad(rows())
    labels = batch["labels"].clone()
    assert trainer.compute_loss(model, batch, return_outputs=True)[1].logits.shape == (*labels.shape, 96)
    trainer.compute_loss(model, batch)
    assert hooks(model) == before and torch.equal(batch["labels"], labels)

    broken = make_model()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    before = hooks(broken)
    trainer = SelectiveTrainer(broken, trainer.args, train_dataset=rows(), data_collator=pad)
    with pytest.warns(UserWarning, match="nan in place of nan"), pytest.raises(FloatingPointError):
        trainer.train()
    trainer.compute_loss(broken, batch)
    assert hooks(broken) == before


def test_the_course_is_that_of_transformers_own_trainer(make_model, tmp_path):
    ours, _, _ = train(make_model(attention_dropout=0.2), tmp_path)
    theirs, _, _ = train(make_model(attention_dropout=0.2), tmp_path, trainer=Trainer)
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-5, atol=0)


def test_rosa_train_takes_it_as_an_option(tmp_path):
    data = [{"instruction": f"Add {i} and {i}.", "output": str(2 * i)} for i in range(8)]
    tokenizer = tiny_tokenizer(row["instruction"] + row["output"] for row in data)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps(data))
    files = {"model": tmp_path / "base", "data": tmp_path / "rows.json", "output": tmp_path / "out"}
    options = dict(max_steps=2, rank=4, use_cpu=True, overwrite=True)
    made = {}
    for more in ({}, dict(response_logits=False)):
        words = [str(word) for name, value in (files | options | more).items() for word in (f"--{name}", value)]
        trainer = finetune(*parse(words))
        made[trainer.response_logits] = trainer.state.log_history[-1]["train_loss"]
    assert made[True] == pytest.approx(made[False], rel=1e-5)
