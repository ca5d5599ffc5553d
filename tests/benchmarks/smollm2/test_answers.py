"""The long runs' answers, question by question: what is kept agrees with the results, and what the tables say of it."""

import json

import pytest
from scipy import stats

from benchmarks.smollm2 import answers
from benchmarks.smollm2.answers import Question, likeness
from benchmarks.smollm2.study import Study


def test_a_question_with_other_numbers_is_alike_and_one_of_other_words_is_not():
    training = [
        {"instruction": "Tom has 3 apples and eats 1 of them."},
        {"instruction": "A train drives for", "input": "7 hours."},
    ]
    asked = [
        {"instruction": "Tom has 12 apples, and eats 5 of them"},
        {"instruction": "Tom has 12 apples and sells 5 of them"},
        {"instruction": "What is the capital of France?"},
        {"instruction": "a train drives for 9 hours"},
    ]
    # Seven triples and seven; three of each have the other verb.
    assert likeness(asked, training) == pytest.approx([1.0, 4 / 10, 0.0, 1.0])


@pytest.mark.parametrize("comparison", answers.COMPARISONS)
def test_the_kept_answers_are_those_of_the_results(comparison):
    questions, study = answers.read(comparison), Study(comparison)
    tested = {(name, outcome["seed"]): outcome for name in study.rates for outcome in study.tested[name]}
    assert {(name, seed) for name, by_seed in questions[0].right.items() for seed in by_seed} == set(tested)
    for (name, seed), outcome in tested.items():
        for task, counts in outcome["tasks"].items():
            right = [question.right[name][seed] for question in questions if question.task == task]
            assert (sum(right), len(right)) == (counts["correct"], counts["total"])


@pytest.mark.parametrize("comparison", answers.COMPARISONS)
def test_runs_without_their_predictions_keep_their_answers(comparison, monkeypatch, tmp_path):
    kept = answers._file(comparison).read_text(encoding="utf-8")
    monkeypatch.setattr(answers, "KEPT", tmp_path)
    monkeypatch.setattr(answers, "ROOT", tmp_path)  # where no predictions lie, as in a clone
    with pytest.raises(FileNotFoundError):
        answers.collect(comparison)
    answers._file(comparison).write_text(kept, encoding="utf-8")
    answers.collect(comparison)
    assert answers._file(comparison).read_text(encoding="utf-8") == kept


def test_a_run_with_predictions_is_added(monkeypatch, tmp_path):
    kept = answers._file("arithmetic_long").read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(answers, "KEPT", tmp_path)
    monkeypatch.setattr(answers, "ROOT", tmp_path)
    other = [",".join(line.split(",")[:-1]) for line in kept]  # without the last run
    answers._file("arithmetic_long").write_text("\n".join(other) + "\n", encoding="utf-8")
    study = Study("arithmetic_long")
    method, _, seed = kept[0].split(",")[-1].rpartition(":")
    cell = study.comparison.cell(study.comparison.models[0], method, int(seed), study.rates[method])
    folder = tmp_path / cell.folder / "predictions"
    folder.mkdir(parents=True)
    for task in study.comparison.tasks.split(","):
        rows = [line.split(",") for line in kept[1:] if line.startswith(f"{task},")]
        predictions = ({"instruction": f"{task} {at}", "correct": row[-1] == "1"} for at, row in enumerate(rows))
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(made) + "\n" for made in predictions))
    data = tmp_path / study.comparison.train["data"]
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps([{"instruction": "MultiArith 0", "output": "1"}]))
    answers.collect("arithmetic_long")
    found = answers._file("arithmetic_long").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[2:] for line in found] == [line.split(",")[2:] for line in kept]
    assert found[1].startswith("MultiArith,1.000,")


@pytest.fixture
def questions():
    pairs = [(1, 0)] * 6 + [(0, 1)] * 2 + [(1, 1)] * 4 + [(0, 0)] * 8
    found = [
        Question("sums", 0.95 if at < 10 else 0.2, {"weak": {1: bool(weak)}, "strong": {1: bool(strong)}})
        for at, (strong, weak) in enumerate(pairs)
    ]
    return [*found, Question("gsm8k", 0.1, {"weak": {1: False}, "strong": {1: False}})]


def test_answers_are_told_by_likeness(questions):
    table = answers.likeness_table(questions).splitlines()
    assert table[0] == "| like a training question | questions | strong | weak |"
    assert "| 0.9 to 1 | 10 | 80.0 | 40.0 |" in table
    assert "| 0 to 0.5 | 11 | 18.2 | 18.2 |" in table
    assert "| of these not of gsm8k | 10 | 20.0 | 20.0 |" in table


def test_two_methods_are_compared_on_the_same_questions(questions):
    (row,) = answers.pairs_table(questions).splitlines()[2:]
    p = stats.binomtest(2, 8).pvalue
    # 4 of 21 more; the variance of a difference of -1, 0 and 1 over 21 questions.
    error = 100 * ((8 - 16 / 21) ** 0.5) / 21
    assert row.startswith(f"| strong, weak | 6 | 2 | +19.0 | +19.0 ± {error:.1f} (p = {p:.3f}) |")
    assert row.endswith("| +0.0 ± 0.0 (p = 1.000) |")


def test_runs_of_several_seeds_count_together_and_are_told_apart(questions):
    # With another seed both are right wherever the strong one was. The strong one has a third, which changes nothing.
    for question in questions:
        right = question.right["strong"][1]
        question.right["strong"] |= {2: right, 3: right}
        question.right["weak"] |= {2: right}
    (row,) = answers.pairs_table(questions).splitlines()[2:]
    p = stats.binomtest(2, 8).pvalue
    error = 100 * ((8 / 4 - (4 / 2) ** 2 / 21) ** 0.5) / 21  # differences of half a question
    assert row.startswith(f"| strong, weak | 6 | 2 | +19.0, +0.0 | +9.5 ± {error:.1f} (p = {p:.3f}) |")
