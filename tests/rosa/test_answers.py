"""What is read out of a model's text: real outputs, made-up ones, and properties."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa.tasks import ARITHMETIC, COMMONSENSE, Task, extract_answer, is_correct

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data is not at ../shared/data")

# Outputs of which something else is read than `pred`, as "file index": why. There are none.
DELIBERATELY_DIFFERENT: dict[str, str] = {}
# Outputs to AQuA that break off before they give an answer.
WITHOUT_A_LETTER = {59, 118}


@needs_real_data
@pytest.mark.parametrize(("name", "count"), [("AddSub", 395), ("MultiArith", 600)])
def test_same_value_is_read_from_every_real_output(name, count):
    outputs = json.loads((REAL_DATA / "model_outputs" / f"{name}.json").read_text())
    assert len(outputs) == count
    different = {
        f"{name} {index}"
        for index, output in enumerate(outputs)
        if extract_answer(name, output["chain-of-thought"]) != output["pred"]
    }
    assert different == {place for place in DELIBERATELY_DIFFERENT if place.startswith(name)}
    judged = [is_correct(name, output["chain-of-thought"], str(output["answer"])) for output in outputs]
    assert judged == [abs(output["pred"] - output["answer"]) <= 1e-3 for output in outputs]


@needs_real_data
def test_letter_that_real_outputs_give_as_the_answer_is_read():
    rows = json.loads((REAL_DATA / "benchmarks" / "AQuA" / "test.json").read_text())
    for index, row in enumerate(rows):
        given = re.search(r"answer is \(([A-E])\)\.?\s*$", row["output"])
        assert (given is None) == (index in WITHOUT_A_LETTER)
        assert extract_answer("AQuA", row["output"]) == (given and given[1])


# Options


@pytest.mark.parametrize(
    ("task", "text", "option"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "False. It is true that", "false"),
        ("boolq", "the statement is untrue", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("ARC-Easy", "Answer3: the days", "answer3"),
        ("ARC-Easy", "answer10, answer2", "answer2"),
        ("social_i_qa", "answer4", None),
        ("hellaswag", "ENDING4", "ending4"),
        ("winogrande", "option1/option2", "option1"),
        ("winogrande", "", None),
    ],
)
def test_first_option_that_occurs_is_read(task, text, option):
    assert extract_answer(task, text) == option


@pytest.mark.parametrize("task", COMMONSENSE, ids=lambda task: task.name)
def test_every_option_is_read_and_no_other_is_correct(task):
    for option in task.answer:
        text = f"the correct answer is {option}"
        assert [is_correct(task, text, answer) for answer in task.answer] == [
            answer == option for answer in task.answer
        ]


def test_options_of_ones_own_may_be_any_text():
    task = Task("own", ("C", "C++", "Not sure", "not"))
    assert extract_answer(task, "I say c++.") == "C++"
    assert extract_answer(task, "NOT SURE") == "Not sure"
    assert extract_answer(task, "not at all") == "not"
    assert extract_answer(task, "nothing in ABC") is None


# Numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("67 - 33 = 34 dollars left. The answer is 34 dollars.", 34),
        ("The answer is 1,234,567.", 1234567),
        ("It costs $1,234.50.", 1234.5),
        ("-$5", -5),
        ("$-5", -5),
        ("€ 3", 3),
        ("x = \u22124", -4),
        ("it is -0.25 now", -0.25),
        ("so 10-7", 7),
        ("10 - 7", 7),
        ("(2+5)-3", 3),
        ("10%-20%", 20),
        ("so .5", 0.5),
        ("well...5", 5),
        ("16.00", 16),
        ("12.The end", 12),
        ("3, 4", 4),
        ("1,2345", 2345),
        ("none at all", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_last_number_is_read(text, number):
    assert extract_answer("gsm8k", text) == number


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("0.3333", "0.3333333333333333", True),
        ("0.332", "0.3333333333333333", False),
        ("15", "15.0", True),
        ("$1,000", "1,000.0", True),
        ("nothing", "0", False),
    ],
)
def test_numbers_count_as_equal_within_a_thousandth(text, answer, correct):
    assert is_correct("SVAMP", text, answer) is correct


untimed = settings(deadline=None)
numbers = st.floats(-1e12, 1e12).map(lambda value: round(value, 3)) | st.integers(-(10**12), 10**12)
spellings = st.sampled_from(["{}", "{}.", "${}", "The answer is {}.", "= {} dollars", "**{}**", "£{} in all.", "({})"])
plain_text = st.text(st.characters(exclude_categories=["Nd", "No", "Nl", "Cs"]), max_size=30)


@untimed
@given(numbers, st.sampled_from(["", ","]), spellings)
def test_number_is_read_back_however_it_is_written(number, separator, spelling):
    digits = format(abs(number), f"{separator}.3f" if isinstance(number, float) else f"{separator}d")
    for signed in ("-{}", "\u2212{}") if number < 0 else ("{}",):
        assert extract_answer("gsm8k", spelling.format(signed.format(digits))) == pytest.approx(number, abs=1e-3)


@untimed
@given(numbers, st.text(max_size=30))
def test_text_before_the_number_does_not_matter(number, text):
    assert is_correct("gsm8k", f"{text} answer: {number:.3f}", f"{number:.3f}")


@untimed
@given(numbers, plain_text)
def test_text_without_digits_after_the_number_does_not_matter(number, text):
    assert extract_answer("gsm8k", f"{number:.3f} {text}") == pytest.approx(number, abs=1e-3)


@untimed
@given(st.text())
def test_any_text_is_read_without_an_error(text):
    for task in (*ARITHMETIC, *COMMONSENSE):
        extract_answer(task, text)


# Letters


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Rationale: the speed is 40.The answer is (D).", "D"),
        ("A: The answer is (E).", "E"),
        ("A: D", "D"),
        ("answer: C", "C"),
        ("Answer:\nC", "C"),
        ("Answer = E", "E"),
        ("Final answer: E. 12", "E"),
        ("The answer is: C - 62", "C"),
        ("The answer is A.", "A"),
        ("The answer is A because it is 5", "A"),
        ("So the answer would be (a)", "A"),
        ("Therefore, the correct option is B", "B"),
        ("The correct answer is: **B) 12**", "B"),
        ("The answer is $\\boxed{\\text{(B)}}$.", "B"),
        ("The answer is option (C), not option B.", "C"),
        ("The answer is not (A), the answer is (B).", "B"),
        ("The answer is (A). No: it is twice as much, so the answer is (C).", "C"),
        ("(E) is the correct answer", "E"),
        ("B is correct", "B"),
        ("D", "D"),
        ("d", "D"),
        ("(B) 12", "B"),
        ("C) 62 m", "C"),
        ("C. 62 m", "C"),
        ("C\n62 m", "C"),
        ("**C**", "C"),
        ("\\boxed{C}", "C"),
        ("Therefore, D", "D"),
        ("(A) is 5 km, (B) is 6 km; so (B).", "B"),
        ("It is 62 m, which is choice (C), of course", "C"),
        # Capital letters that are no answer.
        ("", None),
        ("A: There were 5 apples in the box.", None),
        ("A man walks 5 km.", None),
        ("Answer: A train is 5 km long.", None),
        ("The answer is a multiple of 5", None),
        ("The answer is B/2700 * A dollars", None),
        ("The answer is D/(M-3). Thus (A)", "A"),
        ("P(A/B) = P(A) = 0.2", None),
        ("So A travels 5 km and B travels 3 km", None),
        ("The distance between A and B is 140 miles", None),
        ("Answer Choices: (A) 1 (B) 2", None),
        ("Each of the boys is in Grade B5", None),
        ("B's age is 12", None),
    ],
)
def test_letter_is_the_one_given_as_the_answer(text, letter):
    assert extract_answer("AQuA", text) == letter


@untimed
@given(
    st.sampled_from("ABCDE"), st.text(max_size=60), st.sampled_from(["The answer is ({}).", "answer: {}", "answer {}"])
)
def test_explanation_before_the_stated_letter_does_not_matter(letter, text, spelling):
    assert is_correct("AQuA", f"{text}\n{spelling.format(letter)}", letter)


# Texts, and what cannot be judged


def test_texts_are_compared_without_case_spacing_and_full_stop():
    task = Task("own", "text")
    assert extract_answer(task, "  The  blue\nbird. ") == "The blue bird"
    assert is_correct(task, "the blue bird", "The blue  Bird.")
    assert not is_correct(task, "the bird", "the blue bird")


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        ("boolq", "yes", "`answer` must be one of true, false, got 'yes'"),
        ("gsm8k", "12 apples", "`answer` must be a number such as 1,234.5, got '12 apples'"),
        ("gsm8k", "", "must be a number"),
        ("AQuA", "F", "`answer` must be a letter from A to E, got 'F'"),
        (Task("own", "text"), " ", "`answer` must be a text, got ' '"),
        ("boolk", "true", "there is no benchmark 'boolk': it must be one of boolq, piqa"),
    ],
)
def test_truth_in_another_form_is_an_error(task, answer, message):
    with pytest.raises(ValueError, match=message):
        is_correct(task, "true 1 (A)", answer)
