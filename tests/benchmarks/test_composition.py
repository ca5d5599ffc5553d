"""`benchmarks.composition`: its document is what the kept answers give, its training is what the rows say."""

import pytest
import torch

import rosa
from benchmarks import composition, composition_report
from benchmarks.composition import FORM, SKILL, Setting
from benchmarks.composition_data import Row, make_rows
from benchmarks.document import fill
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

SETTING = Setting((0, 1), 3, steps=6)


def test_the_document_has_what_the_answers_give():
    text = composition_report.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, composition_report.parts()), "run `python -m benchmarks.composition`"


def test_every_setting_has_its_answers_to_all_held_out_rows():
    rows = make_rows(composition.FORM_ROWS)
    for setting in composition.SETTINGS:
        for column in composition_report.COLUMNS:
            kept = composition_report.find(setting.name, column)
            assert kept["numbers"] == [row.number for row in rows.problems] and len(kept["problems"]) == 120
            assert len(kept["questions"]) == len(rows.questions) == 60
        assert Setting(*(tuple(v) if isinstance(v, list) else v for v in map(kept.get, Setting._fields))) == setting


def test_nothing_that_is_held_out_is_learnt():
    train, problems, questions = make_rows(composition.FORM_ROWS)
    learnt = {row.prompt for row in train}
    assert len(learnt) == 192 and [row.task for row in train[:4]] == [FORM, SKILL] * 2
    assert not learnt & {row.prompt for row in (*problems, *questions)}
    assert all((row.answer == row.answer.upper()) == (row.task == FORM) for row in train)


@pytest.mark.parametrize(
    "text, form, right",
    [
        ("5 - 3 = 2. THE ANSWER IS 2", True, True),
        ("5 - 3 = 2. The answer is 2", False, True),
        ("5 - 3 = 1.", False, False),
        ("TWO", True, False),
        ("", False, False),
    ],
)
def test_an_answer_is_judged_by_its_letters_and_its_last_number(text, form, right):
    assert (composition_report.in_form(text), composition_report.is_right(text, 2)) == (form, right)
    scores = composition_report.SCORES
    kept = {"problems": [text], "numbers": [2], "questions": [text]}
    assert [score(kept) for score in scores.values()] == [form, right, form and right, form]


@pytest.fixture(scope="module")
def rows():
    texts = ["one two three", "how many do they have", "what is it", "three and four and five"]
    return [Row(task, text, text[::-1]) for text in texts for task in (FORM, SKILL)] * 3


@pytest.fixture
def model_and_tokenizer(rows):
    tokenizer = tiny_tokenizer(row.prompt for row in rows)
    return rosa.compose(tiny_model(len(tokenizer)), (FORM, SKILL), SETTING.layers, SETTING.positions), tokenizer


@pytest.mark.parametrize("positions", [1, 3])
def test_prompts_computed_once_give_the_gradients_of_whole_rows(rows, model_and_tokenizer, positions):
    model, tokenizer = model_and_tokenizer
    rosa.compose(rosa.decompose(model), (FORM, SKILL), SETTING.layers, positions)
    parameters = rosa.composition_parameters(model).values()
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    _, inputs, tasks = batch = composition._batch(model, tokenizer, rows[:8], positions)
    with rosa.tasks_by_row(model, tasks):
        model(**inputs, past_key_values=batch.cache).loss.backward()
    found = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad()

    weights = [len(tokenizer(row.answer)["input_ids"]) + 1 for row in rows[:8]]
    for row, weight in zip(rows[:8], weights, strict=True):
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = [*tokenizer(row.answer)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with rosa.use_tasks(model, row.task):
            loss = model(torch.tensor([prompt + answer]), labels=labels).loss
        (loss * weight / sum(weights)).backward()
    for one, other in zip(found, (parameter.grad for parameter in parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(rows, model_and_tokenizer, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(composition, "SAVE_EVERY", 2)
    ends = []
    for stop in (None, 5):
        monkeypatch.setattr(composition, "RUNS", tmp_path / str(stop))
        rosa.compose(rosa.decompose(model), (FORM, SKILL), SETTING.layers, SETTING.positions)
        if stop is not None:
            hook = model.register_forward_pre_hook(stopping(stop))
            with pytest.raises(KeyboardInterrupt):
                composition.train(model, tokenizer, rows, SETTING)
            hook.remove()
            rosa.compose(rosa.decompose(model), (FORM, SKILL), SETTING.layers, SETTING.positions)
        composition.train(model, tokenizer, rows, SETTING)
        ends.append([parameter.detach().clone() for parameter in rosa.composition_parameters(model).values()])
    for straight, stopped in zip(*ends, strict=True):
        assert torch.equal(straight, stopped) and not torch.equal(straight, torch.zeros_like(straight))


def stopping(calls):
    """A hook that stops the run at a call of the model."""
    left = iter(range(calls - 1))

    def hook(module, args):
        if next(left, None) is None:
            raise KeyboardInterrupt

    return hook
