"""Composition: which numbers of which tokens are turned, by which task, in training and in generation."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import rosa
from rosa.composition.compose import composed
from rosa_kernels.road_reference import road_reference
from tests.rosa.conftest import make_model

TASKS = ("form", "skill")
WIDTH, PAIRS = 32, 16


def make_composed(family="llama", *, tasks=TASKS, layers=2, positions=1, **changes):
    """A composed model, whose angles and scales have values as training would give them."""
    model = rosa.compose(make_model(family, **changes).eval(), tasks, layers, positions)
    generator = torch.Generator().manual_seed(11)
    for parameter in rosa.composition_parameters(model).values():
        with torch.no_grad():
            parameter += torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def prompts(batch):
    """Two rows, the second one padded on the left."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))


def behind(model, layer, inputs, **options):
    """The output of a decoder layer in a pass through the model."""
    found = []
    hook = model.model.layers[layer].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(inputs, **options)
    hook.remove()
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


def by_formula(model, hidden, tasks, layer=2):
    """R_m h = (m R + (1 - m) I) h, pair by pair."""
    rotation = composed(model)[1].rotations[layer]
    share = PAIRS // 2
    owned = {"form": range(share), "skill": range(share, PAIRS)}
    out = hidden.clone()
    for i in (i for task in tasks for i in owned[task]):
        a, t = rotation.alpha[i], rotation.theta[i]
        h1, h2 = hidden[..., 2 * i], hidden[..., 2 * i + 1]
        out[..., 2 * i], out[..., 2 * i + 1] = a * (t.cos() * h1 - t.sin() * h2), a * (t.sin() * h1 + t.cos() * h2)
    return out.detach()


def test_a_fresh_composition_and_one_without_a_task_compute_what_the_base_computes(family, prompts):
    base = make_model(family).eval()(**prompts).logits
    model = rosa.compose(make_model(family).eval(), TASKS, layers=(1, 2))
    with rosa.use_tasks(model, *TASKS):
        assert torch.equal(model(**prompts).logits, base)
    stirred = make_composed(family)
    assert torch.equal(stirred(**prompts).logits, base)
    with rosa.use_tasks(stirred):
        assert torch.equal(stirred(**prompts).logits, base)
    with rosa.use_tasks(stirred, "form"):
        assert not torch.allclose(stirred(**prompts).logits, base)


@pytest.mark.parametrize("tasks", [("form",), ("skill",), TASKS])
def test_the_last_prompt_token_is_turned_in_the_pairs_of_the_tasks(ids, tasks):
    model = make_composed()
    before = behind(model, 2, ids)
    with rosa.use_tasks(model, *tasks):
        after = behind(model, 2, ids)
    assert torch.equal(after[:, :-1], before[:, :-1])
    torch.testing.assert_close(after[:, -1], by_formula(model, before, tasks)[:, -1])
    other = [i for i in range(WIDTH) if (i < WIDTH // 2) != ("form" in tasks)] if len(tasks) == 1 else []
    assert torch.equal(after[:, -1, other], before[:, -1, other])


@pytest.mark.parametrize("positions, turned", [(3, slice(-3, None)), (100, slice(None)), ("all", slice(None))])
def test_more_tokens_are_turned_if_asked(ids, positions, turned):
    model = make_composed(positions=positions)
    before = behind(model, 2, ids)
    expected = before.clone()
    expected[:, turned] = by_formula(model, before, TASKS)[:, turned]
    with rosa.use_tasks(model, *TASKS):
        torch.testing.assert_close(behind(model, 2, ids), expected)


def test_tasks_own_as_many_pairs_as_they_are_given(ids):
    model = make_composed(tasks={"form": 3, "skill": 13})
    before = behind(model, 2, ids)
    with rosa.use_tasks(model, "form"):
        changed = (behind(model, 2, ids) != before)[:, -1].any(0)
    assert changed.tolist() == [True] * 6 + [False] * 26


def test_without_a_layer_the_middle_one_is_turned():
    assert list(rosa.composition_parameters(rosa.compose(make_model(), TASKS))) == [
        "model.layers.2.composition.theta",
        "model.layers.2.composition.alpha",
    ]


def test_every_row_is_computed_with_its_own_tasks(ids):
    model = make_composed(layers=(1, 3), positions=2)
    rows = ["form", "skill", TASKS, None]
    texts = ids[:1].expand(4, -1)
    with rosa.tasks_by_row(model, rows), torch.no_grad():
        together = model(texts).logits
    for row, tasks in enumerate((("form",), ("skill",), TASKS, ())):
        with rosa.use_tasks(model, *tasks), torch.no_grad():
            torch.testing.assert_close(together[row], model(texts[row : row + 1]).logits[0])


def test_in_training_the_prompt_ends_before_the_first_label(ids):
    model = make_composed().train()
    labels = ids.clone()
    labels[0, :4] = labels[1, :7] = -100
    before = behind(model, 2, ids, labels=labels)
    with rosa.use_tasks(model, *TASKS):
        after = behind(model, 2, ids, labels=labels)
    assert (after != before).any(-1).nonzero().tolist() == [[0, 3], [1, 6]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_no_part_of_the_prompt(ids, side):
    model = make_composed(positions=2)
    texts = [ids[0], ids[1, :5]]
    rows = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.long)
    rows[0], mask[0] = texts[0], 1
    place = slice(4, None) if side == "left" else slice(0, 5)
    rows[1, place], mask[1, place] = texts[1], 1
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for options in ({}, {"prompt_lengths": [9, 5]}):
        with rosa.use_tasks(model, *TASKS, **options), torch.no_grad():
            padded = model(rows, attention_mask=mask, position_ids=at).logits
        for row, text in enumerate(texts):
            with rosa.use_tasks(model, *TASKS), torch.no_grad():
                torch.testing.assert_close(padded[row][mask[row].bool()], model(text[None]).logits[0])


def test_given_lengths_say_where_the_prompts_end(ids):
    model = make_composed()
    before = behind(model, 2, ids)
    with rosa.use_tasks(model, *TASKS, prompt_lengths=[4, 9]):
        after = behind(model, 2, ids)
    assert (after != before).any(-1).nonzero().tolist() == [[0, 3], [1, 8]]


def test_a_filled_cache_holds_the_prompt_unless_lengths_say_otherwise(ids):
    model = make_composed()
    with torch.no_grad():
        whole = model(ids).logits
        with rosa.use_tasks(model, *TASKS, prompt_lengths=[6, 6]):
            expected = model(ids).logits
        with rosa.use_tasks(model, *TASKS):
            cache = model(ids[:, :6], use_cache=True).past_key_values
            torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, expected[:, 6:])
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with rosa.use_tasks(model, *TASKS, prompt_lengths=[6, 6]):
            torch.testing.assert_close(model(ids[:, 4:], past_key_values=cache).logits, expected[:, 4:])
    assert not torch.allclose(whole, expected)


def by_hand(model, text, tasks, new):
    """Greedy decoding of one text without a cache."""
    ids = text[None]
    with rosa.use_tasks(model, *tasks, prompt_lengths=[len(text)]), torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(text) :]


@pytest.mark.parametrize("options", [{}, {"num_beams": 1, "cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("positions", [1, "all"])
def test_generate_gives_each_row_what_decoding_by_hand_gives_it(ids, family, positions, options):
    model = make_composed(family, positions=positions, initializer_range=0.1 if family == "gemma2" else 0.3)
    texts = [ids[0], ids[1, :5], ids[1, 2:6]]
    rows, mask = torch.zeros(2, 3, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        rows[row, 9 - len(text) :], mask[row, 9 - len(text) :] = text, 1
    tasks = ["form", None, TASKS]
    lengths = [len(text) for text in texts] if options.get("use_cache") is False else None
    with rosa.tasks_by_row(model, tasks, prompt_lengths=lengths):
        found = model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, **options
        )
    for row, (text, chosen) in enumerate(zip(texts, (("form",), (), TASKS), strict=True)):
        assert torch.equal(found[row, 9:], by_hand(model, text, chosen, 6))


@pytest.mark.parametrize("positions", [3, "all"])  # "all": with every token that the beams write
def test_a_row_keeps_its_tasks_in_its_beams(ids, positions):
    model = make_composed(positions=positions, initializer_range=0.3)
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    with rosa.tasks_by_row(model, ["form", "skill"]):
        together = model.generate(ids, **options)
    for row, task in enumerate(("form", "skill")):
        with rosa.use_tasks(model, task):
            assert torch.equal(together[row], model.generate(ids[row : row + 1], **options)[0])


def labelled(ids, prompt=5):
    labels = ids.clone()
    labels[:, :prompt] = -100
    return labels


def test_a_task_learns_from_its_own_rows_alone_and_the_base_from_none(ids):
    model = make_composed(layers=(1, 2)).train()
    with rosa.tasks_by_row(model, ["form", None]):
        model(ids, labels=labelled(ids)).loss.backward()
    for parameter in rosa.composition_parameters(model).values():
        assert parameter.grad[: PAIRS // 2].all() and not parameter.grad[PAIRS // 2 :].any()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(
        rosa.composition_parameters(model)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient_whatever_runs_before_backward(ids, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = make_composed(layers=(1, 2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with rosa.tasks_by_row(model, ["form", "skill"]):
            first = model(ids, labels=labelled(ids)).loss
        with rosa.use_tasks(model, "skill"):
            second = model(ids, labels=labelled(ids, 3)).loss
        (first + second).backward()
        grads.append([p.grad for p in rosa.composition_parameters(model).values()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


class ByTask(Trainer):
    def training_step(self, model, inputs, *args):
        with rosa.tasks_by_row(model, inputs.pop("task")):
            return super().training_step(model, inputs, *args)


def test_a_trainer_trains_both_tasks_together(ids, tmp_path):
    rows = [{"input_ids": row, "labels": labelled(ids)[0], "task": task} for row in ids for task in TASKS]

    def collate(rows):
        tensors = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return tensors | {"task": [row["task"] for row in rows]}

    model = rosa.compose(make_model("llama"), TASKS, 1)
    base = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, remove_unused_columns=False,
        report_to=[], save_strategy="no", use_cpu=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = ByTask(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, base[name])}
    assert changed == set(rosa.composition_parameters(model))
    assert all((p != base[name]).all() for name, p in rosa.composition_parameters(model).items())


def test_hidden_states_that_the_model_returns_are_turned(ids):
    model = make_composed()
    with rosa.use_tasks(model, *TASKS), torch.no_grad():
        returned = model(ids, output_hidden_states=True).hidden_states[3]
        torch.testing.assert_close(returned, behind(model, 2, ids))


def test_sixteen_bits_are_rounded_once(ids):
    model = make_composed().to(torch.bfloat16)
    rotation = composed(model)[1].rotations[2].float()
    before = behind(model, 2, ids)
    with rosa.use_tasks(model, *TASKS):
        after = behind(model, 2, ids)[:, -1]
    assert torch.equal(after, road_reference(before[:, -1], rotation.theta, rotation.alpha, variant=1))


def test_decompose_leaves_the_model_as_it_was(prompts):
    model = make_model("llama").eval()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attributes = set(model.__dict__)
    expected = model(**prompts).logits
    rosa.compose(model, TASKS, (0, 3))
    with rosa.use_tasks(model, "form"):
        model(**prompts)
    assert rosa.is_composed(model) and rosa.decompose(model) is model and not rosa.is_composed(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert set(model.__dict__) == attributes
    assert torch.equal(model(**prompts).logits, expected)


def test_a_copy_is_a_composed_model_of_its_own(ids):
    model = make_composed()
    twin = copy.deepcopy(model)
    rosa.decompose(model)
    with rosa.use_tasks(twin, "form"), torch.no_grad():
        assert not torch.allclose(twin(ids).logits, model(ids).logits)


def test_what_was_chosen_before_a_block_is_chosen_after_it_also_after_an_error(ids):
    model = make_composed()
    with torch.no_grad(), rosa.use_tasks(model, "form"):
        expected = model(ids).logits
        with pytest.raises(ValueError), rosa.tasks_by_row(model, ["skill", None, "form"]):
            model(ids)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tasks=("a", "b", "c")), "16 pairs do not divide among 3 tasks: say how many each has"),
        (dict(tasks={"a": 8, "b": 9}), "whole numbers above 0 with the sum 16, got {'a': 8, 'b': 9}"),
        (dict(tasks={"a": 16, "b": 0}), "whole numbers above 0 with the sum 16"),
        (dict(tasks="form"), "tasks must be names, or names with their numbers of pairs, got 'form'"),
        (dict(tasks=()), "tasks must be names"),
        (dict(tasks=("a", "a")), "a task has its name twice"),
        (dict(layers=4), "layers must be among 0 to 3 in this LlamaForCausalLM, got 4"),
        (dict(layers=(0, -1)), "layers must be among 0 to 3"),
        (dict(layers=()), "layers must be among 0 to 3"),
        (dict(positions=0), 'positions must be "all" or a number of tokens at the end of the prompt, at least 1'),
        (dict(positions="last"), "positions must be"),
        (dict(positions=True), "positions must be"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(options, message):
    model = make_model("llama")
    state, modules = dict(model.named_parameters()), len(list(model.modules()))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        rosa.compose(model, **{"tasks": TASKS, "layers": 1} | options)
    assert dict(model.named_parameters()).keys() == state.keys() and len(list(model.modules())) == modules
    assert all(p.requires_grad for p in model.parameters()) and not rosa.is_composed(model)


def test_models_that_cannot_be_composed_are_refused():
    with pytest.raises(rosa.UnsupportedModelError, match="hidden width of this LlamaForCausalLM is 33, which is odd"):
        rosa.compose(make_model("llama", hidden_size=33, num_attention_heads=3, num_key_value_heads=3), TASKS)
    with pytest.raises(rosa.UnsupportedModelError, match="takes a model of transformers, not a Linear"):
        rosa.compose(torch.nn.Linear(2, 2), TASKS)
    with pytest.raises(ValueError, match="carries an adapter of rosa.patch"):
        rosa.compose(rosa.patch(make_model("llama"), rosa.RosaConfig(rank=4)), TASKS)
    model = make_composed()
    with pytest.raises(ValueError, match=r"has the rotations of rosa.compose.*rosa.decompose\(model\) first"):
        rosa.patch(model, rosa.RoadConfig())
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r"is composed already, at .*layers\.2\.composition"):
            rosa.compose(part, TASKS)
    with pytest.raises(ValueError, match="is not composed; call rosa.compose"):
        rosa.decompose(make_model("llama"))


def test_tasks_that_do_not_fit_are_refused(ids):
    model = make_composed()
    with pytest.raises(KeyError, match="no task 'speed'; it has form, skill"), rosa.use_tasks(model, "form", "speed"):
        pass
    with pytest.raises(KeyError, match="no task 'speed'"), rosa.tasks_by_row(model, ["form", "speed"]):
        pass
    with (
        pytest.raises(ValueError, match="every row its task, got 'form'"),
        rosa.tasks_by_row(model, "form"),
    ):
        pass
    with rosa.tasks_by_row(model, ["form", "skill", None]):
        with pytest.raises(ValueError, match="tasks are given for 3 rows, but the batch has 2"):
            model(ids)
        with pytest.raises(ValueError, match="tasks are given for 3 rows, but the batch has 4"):
            model.generate(ids, num_beams=2, max_new_tokens=2)
    with rosa.tasks_by_row(model, ["form", "skill"]), pytest.raises(ValueError, match="2 rows, but the batch has 4"):
        model(ids.repeat(2, 1), labels=labelled(ids).repeat(2, 1))  # a forgotten half, not beams
    with rosa.tasks_by_row(model, ["form"]), pytest.raises(ValueError, match="1 rows, but the batch has 2"):
        model(ids, labels=labelled(ids))


def test_prompts_that_have_no_end_or_end_elsewhere_are_refused(ids):
    model = make_composed()
    for lengths, message in (
        ([3, 0], "prompt_lengths must be numbers of tokens, at least 1, got"),
        ([3, 10], "prompt_lengths gives row 1 10 tokens, but it has 9"),
        ([3, 3, 3], "prompt_lengths are given for 3 rows, but the batch has 2"),
    ):
        with pytest.raises(ValueError, match=message), rosa.use_tasks(model, "form", prompt_lengths=lengths):
            model(ids)
    with rosa.use_tasks(model, "form"):
        with pytest.raises(ValueError, match="row 0 has a label on its first token"):
            model(ids, labels=ids)
        with pytest.raises(ValueError, match="nothing says where the prompts end"):
            model.generate(ids, use_cache=False, max_new_tokens=2)
        with pytest.raises(ValueError, match="nothing says where the prompts end"):
            model.train()(ids)
        with rosa.use_tasks(model):
            model(ids)  # the base has no use for an end


def test_a_part_of_the_model_does_not_run_without_its_tasks(ids):
    model = make_composed()
    with rosa.use_tasks(model, "form"), pytest.raises(RuntimeError, match="the composed model itself is not running"):
        model.model(ids)


def test_a_compiled_model_computes_what_the_model_computes(ids):
    model = make_composed(layers=1, num_hidden_layers=2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for rows in ([None, None], ["form", TASKS], ["skill", None]):
            with rosa.tasks_by_row(model, rows):
                assert torch.equal(compiled(ids).logits, model(ids).logits)
    torch.compiler.reset()
