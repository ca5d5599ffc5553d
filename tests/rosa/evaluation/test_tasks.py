"""The fifteen benchmarks, tasks of one's own, and their rows: real ones, converted ones and bad ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from rosa.evaluation.tasks import (
    ARITHMETIC,
    COMMONSENSE,
    TASKS,
    Task,
    extract_answer,
    find_tasks,
    is_correct,
    load_test_rows,
)

REAL_DATA = Path(__file__).parents[4] / "shared" / "data" / "benchmarks"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not at ../shared/data")

# The sizes of the test sets in the paper.
COUNTS = {
    "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "ARC-Challenge": 1172, "ARC-Easy": 2376, "openbookqa": 500,
    "hellaswag": 10042, "winogrande": 1267, "MultiArith": 600, "gsm8k": 1319, "AddSub": 395, "AQuA": 254,
    "SingleEq": 508, "SVAMP": 1000, "mawps": 238,
}  # fmt: skip


def write(folder, name, rows, form=None):
    """A task's folder in LLM-Adapters' form; rows that are text are written as they are."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "test.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    if form is not None:
        (folder / name / "task.json").write_text(form if isinstance(form, str) else json.dumps(form))


# Finding


def test_groups_are_the_papers_benchmarks_in_its_order():
    assert list(TASKS) == list(COUNTS)
    assert find_tasks("commonsense") == list(COMMONSENSE) == list(TASKS.values())[:8]
    assert find_tasks("arithmetic") == list(ARITHMETIC) == list(TASKS.values())[8:]


def test_names_and_groups_mix_in_their_order_each_once():
    names = [task.name for task in find_tasks("piqa, commonsense,gsm8k,piqa,,gsm8k")]
    assert names == ["piqa", "boolq", *list(COUNTS)[2:8], "gsm8k"]


@pytest.mark.parametrize(
    ("name", "nearest"), [("bool", "boolq"), ("AQUA", "AQuA"), ("arc_easy", "ARC-Easy"), ("arithmetics", "arithmetic")]
)
def test_unknown_task_gets_the_nearest_known_one(name, nearest):
    with pytest.raises(ValueError, match=f"there is no task '{name}': did you mean {nearest}?"):
        find_tasks(f"piqa,{name}")


def test_a_task_that_is_like_none_is_told_that_it_needs_a_folder():
    with pytest.raises(ValueError, match="no task 'ferry': Known are .*; a task of .* needs --data-dir, .*ferry/task"):
        find_tasks("ferry")


def test_no_task_is_an_error():
    with pytest.raises(ValueError, match="no task is named"):
        find_tasks(" ,")


@pytest.mark.parametrize("form", ["number", "letter", "text", ["yes", "no"]])
def test_task_of_ones_own_describes_itself(tmp_path, form):
    write(tmp_path, "own", [], {"answer": form})
    expected = Task("own", tuple(form) if isinstance(form, list) else form)
    assert find_tasks("own,boolq", tmp_path) == [expected, TASKS["boolq"]]


def test_unknown_task_in_a_data_folder_is_told_what_it_needs(tmp_path):
    write(tmp_path, "colours", [], {"answer": "text"})
    write(tmp_path, "own", [])
    with pytest.raises(
        ValueError, match="'colour': did you mean colours.* a task of your own needs .*colour/task.json"
    ):
        find_tasks("colour", tmp_path)
    with pytest.raises(ValueError, match="there is no task 'own'.*own/task.json"):
        find_tasks("own", tmp_path)
    with pytest.raises(ValueError, match="there is no task '../colours'"):
        find_tasks("../colours", tmp_path / "own")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ('{"answer": "number"', "own/task.json must describe a task: no valid JSON"),
        pytest.param("[" * 100_000, "own/task.json must describe a task: JSON nested too deeply", id="deep"),
        ('["number"]', "own/task.json must describe a task: an object in JSON was expected, not list"),
        ('{"anwser": "number"}', 'nothing else, got {"anwser": "number"}'),
        ('{"answer": "numbr"}', '`answer` must be "number", "letter", "text" or a list of options, got "numbr"'),
        ('{"answer": ["yes", 1]}', "or a list of options"),
        ('{"answer": ["yes", ""]}', "or a list of options"),
        ('{"answer": ["yes"]}', "two different options at least"),
        ('{"answer": ["yes", "Yes"]}', "two different options at least"),
        ('{"answer": []}', "two different options at least"),
    ],
)
def test_bad_description_is_told(tmp_path, description, message):
    write(tmp_path, "own", [], description)
    with pytest.raises(ValueError, match=message):
        find_tasks("own", tmp_path)


# Rows in folders


@needs_real_data
@pytest.mark.parametrize("name", [name for name in COUNTS if name != "hellaswag"])
def test_every_real_row_is_read(name):
    task = TASKS[name]
    rows = load_test_rows(task, REAL_DATA)
    assert len(rows) == COUNTS[name]
    if task in COMMONSENSE:
        assert all(is_correct(task, row["output"], row["answer"]) for row in rows)
    else:
        assert all(extract_answer(task, f"The answer is {row['answer']}.") is not None for row in rows)


@needs_real_data
def test_sample_of_hellaswag_is_read(tmp_path):
    write(tmp_path, "hellaswag", (REAL_DATA / "hellaswag_sample.json").read_text())
    rows = load_test_rows(TASKS["hellaswag"], tmp_path)
    assert len(rows) == 6
    assert all(is_correct("hellaswag", row["output"], row["answer"]) for row in rows)


def test_row_needs_neither_input_nor_output(tmp_path):
    write(tmp_path, "boolq", [{"instruction": "i", "answer": "true", "output": None}])
    assert load_test_rows(TASKS["boolq"], tmp_path) == [
        {"instruction": "i", "answer": "true", "output": None, "input": ""}
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "i", "output": "o"}], "boolq/test.json, row 0: has no `answer`, only instruction, output"),
        ([{"answer": "true"}], "row 0: has no `instruction`"),
        ([{"instruction": "i", "answer": True}], "row 0: `answer` must be a string, got a boolean true"),
        ([{"instruction": "i", "answer": "true"}, ["i"]], "row 1: must be an object with `instruction` and `answer`"),
        (
            [{"instruction": "i", "answer": "true"}, {"instruction": "i", "answer": "yes"}],
            "boolq/test.json, row 1: `answer` must be one of true, false, got 'yes'",
        ),
        ([], "boolq/test.json holds no rows"),
        ("[{]", "boolq/test.json is not valid JSON: line 1"),
        pytest.param("[" * 100_000, "boolq/test.json holds lists or objects that are nested too deeply", id="deep"),
    ],
)
def test_bad_row_is_named(tmp_path, rows, message):
    write(tmp_path, "boolq", rows)
    with pytest.raises(ValueError, match=message):
        load_test_rows(TASKS["boolq"], tmp_path)


def test_what_is_missing_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    for call in (lambda: find_tasks("boolq", missing), lambda: load_test_rows(TASKS["boolq"], missing)):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {missing}$"):
            call()
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'boolq'}$"):
        load_test_rows(TASKS["boolq"], tmp_path)
    (tmp_path / "boolq").mkdir()
    with pytest.raises(FileNotFoundError, match=f"there is no file {tmp_path / 'boolq' / 'test.json'}$"):
        load_test_rows(TASKS["boolq"], tmp_path)


# Rows of the hub's original data sets, written by hand in their schemas

ARC = {"id": "x", "question": "What do plants need?", "answerKey": "C"}
ORIGINAL = {
    "boolq": (
        {"question": "is the sky blue", "passage": "...", "answer": True},
        "Please answer the following question with true or false, question: is the sky blue?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "dresser", "sol1": "replace drawer with bobby pin ", "sol2": "finish, woodgrain", "label": 1},
        "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with bobby pin \n\n"
        "Solution2: finish, woodgrain\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "social_i_qa": (
        {
            "context": "Tracy didn't go home.", "question": "What does Tracy need to do before this?",
            "answerA": "make a new plan", "answerB": "Go home", "answerC": "Find somewhere to go", "label": "3",
        },
        "Please choose the correct answer to the question: Tracy didn't go home. What does Tracy need to do before "
        "this?\n\nAnswer1: make a new plan Answer2: Go home Answer3: Find somewhere to go\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "ARC-Challenge": (
        {**ARC, "choices": {"text": ["soil", "air", "light"], "label": ["A", "B", "C"]}},
        "Please choose the correct answer to the question: What do plants need?\n\nAnswer1: soil Answer2: air "
        "Answer3: light\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "ARC-Easy": (
        {**ARC, "choices": {"text": ["soil", "air", "sun", "tea"], "label": ["1", "2", "3", "4"]}, "answerKey": "4"},
        "Please choose the correct answer to the question: What do plants need?\n\nAnswer1: soil Answer2: air "
        "Answer3: sun Answer4: tea\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
    "openbookqa": (
        {
            "id": "x", "question_stem": "There is most likely going to be fog around:", "answerKey": "A",
            "choices": {"text": ["a marsh", "a tundra", "the plains", "a desert"], "label": ["A", "B", "C", "D"]},
        },
        "Please choose the correct answer to the question: There is most likely going to be fog around:\n\n"
        "Answer1: a marsh Answer2: a tundra Answer3: the plains Answer4: a desert\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
    "hellaswag": (
        {
            "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he", "label": "3",
            "endings": ["is using wrap.", "is ripping tiles off.", "is holding a cube.", "starts pulling up roofing."],
        },
        "Please choose the correct ending to complete the given sentence: Roof shingle removal: A man is sitting on a "
        "roof. he\n\nEnding1: is using wrap. Ending2: is ripping tiles off. Ending3: is holding a cube. Ending4: "
        "starts pulling up roofing.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
    ),
    "winogrande": (
        {"sentence": "Sarah was better than Maria so _ lost.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was better than "
        "Maria so _ lost.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2",
        "option2",
    ),
    "MultiArith": ({"question": " How many? ", "final_ans": "15"}, " How many? ", "15"),
    "gsm8k": ({"question": "How many?", "answer": "It is <<2*617=1234>>1234.\n#### 1,234"}, "How many?", "1,234"),
    "AQuA": (
        {"question": "How far?", "options": ["A)21 km", "B)20 km", "C)5", "D)6", "E)7"], "correct": "B"},
        "How far? Answer Choices: (A) 21 km (B) 20 km (C) 5 (D) 6 (E) 7",
        "B",
    ),
    "SVAMP": (
        {"ID": "chal-1", "Body": "If she had 32 crackers initially", "Question": "How many are left?", "Answer": "8.0"},
        "If she had 32 crackers initially. How many are left?",
        "8.0",
    ),
}  # fmt: skip


def on_disk(task, folder, originals, **changes):
    """The task, with its original data set in a folder here instead of on the hub."""
    Dataset.from_list(originals).to_parquet(folder / "test.parquet")
    here = {"name": str(folder), "split": "test", "config": None, "revision": None, "rows": len(originals)}
    return replace(task, hub=replace(task.hub, **{**here, **changes}))


def test_every_benchmark_with_a_data_set_is_converted_below():
    assert set(ORIGINAL) == {name for name, task in TASKS.items() if task.hub is not None}
    assert all(task.hub.rows == COUNTS[name] for name, task in TASKS.items() if task.hub is not None)


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_row_is_turned_into_the_wording_of_llm_adapters(name, tmp_path):
    row, instruction, answer = ORIGINAL[name]
    rows = load_test_rows(on_disk(TASKS[name], tmp_path, [row]))
    assert rows == [{"instruction": instruction, "input": "", "answer": answer}]


@needs_real_data
@pytest.mark.parametrize("name", [task.name for task in COMMONSENSE if task.name != "hellaswag"])
def test_wording_is_that_of_the_real_rows(name):
    _, instruction, _ = ORIGINAL[name]
    real = {row["instruction"].split(":")[0] for row in load_test_rows(TASKS[name], REAL_DATA)}
    assert real == {instruction.split(":")[0]}


def test_data_set_of_another_size_or_schema_is_refused(tmp_path):
    row = ORIGINAL["boolq"][0]
    with pytest.raises(ValueError, match="has 1 rows, boolq of the paper has 3270: give a data folder"):
        load_test_rows(on_disk(TASKS["boolq"], tmp_path, [row], rows=3270))
    with pytest.raises(ValueError, match="has changed its columns, 'answer' is not as expected"):
        load_test_rows(on_disk(TASKS["boolq"], tmp_path, [{"question": "q"}]))


@pytest.mark.parametrize("name", ["boolq", "AddSub", "SingleEq", "mawps"])
def test_without_folder_and_hub_the_remedy_is_told(name):
    with pytest.raises(
        FileNotFoundError, match=rf"--data-dir.*{name}/test.json.*github.com/AGI-Edgerunners/LLM-Adapters"
    ):
        load_test_rows(TASKS[name])


def test_task_of_ones_own_has_no_data_set():
    with pytest.raises(FileNotFoundError, match=r"rows of own: give a data folder \(--data-dir\) with own/test.json"):
        load_test_rows(Task("own", "text"))
