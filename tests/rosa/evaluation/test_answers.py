"""What is read out of a model's text: real outputs, made-up ones, and properties."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa.evaluation.tasks import ARITHMETIC, COMMONSENSE, Task, extract_answer, is_correct
from rosa.evaluation.tasks.answers import read_truth

ROOT = Path(__file__).parents[3]
REAL_DATA = ROOT.parent / "shared" / "data"
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
@pytest.mark.parametrize(("name", "different"), [("SVAMP", 1), ("SingleEq", 0), ("gsm8k", 8)])
def test_last_number_is_llm_adapters_but_for_signs_fractions_spaces_and_full_hours(name, different):
    outputs = [row["output"] for row in json.loads((REAL_DATA / "benchmarks" / name / "test.json").read_text())]
    last = [re.findall(r"-?\d+\.?\d*", text.replace(",", ""))[-1:] for text in outputs]
    others = [
        text
        for text, number in zip(outputs, last, strict=True)
        if extract_answer(name, text) != (float(number[0]) if number else None)
    ]
    assert len(others) == different
    assert all(re.search(r"-\$\d+|\d/\d+|\d \d{3}|\d:00", text) for text in others)


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


def test_option_in_letters_that_only_look_the_same_is_read_without_an_error():
    assert extract_answer("winogrande", "opt\u0131on1") == "option1"  # a dotless i, which matches i in any case
    assert is_correct(Task("own", ("STRASSE", "Weg")), "strasse", "stra\xdfe")


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
    ("text", "number"),
    [
        ("$1{,}000$", 1000),
        ("1 000", 1000),
        ("1\u2009000", 1000),
        ("1\u202f000", 1000),
        ("1\xa0000.5", 1000.5),
        ("1\\,000", 1000),
        ("1,\\!000", 1000),
        ("1e3", 1000),
        ("1.5e-4", 0.00015),
        ("1.5E\u22124", 0.00015),
        ("- 5", -5),
        ("7 - 5", 5),
        ("7 -5", 5),
        ("7-5", 5),
        ("is - 5", -5),
        ("= - 5", -5),
        ("= -$ 5", -5),
        ("$ - 5", -5),
        ("-5", -5),
        ("\u22125", -5),
        ("\u20135", -5),
        ("3\u20135", 5),
        ("3-5", 5),
        ("3 \u2013 5", 5),
        ("10:30", 30),
        ("3:00 pm", 3),
        ("10:00", 10),
        ("2020-01-05", 5),
        ("12/25/2020", 2020),
        ("\\frac{1}{2}", 0.5),
        ("\\dfrac{3}{4}", 0.75),
        ("-\\frac{1}{2}", -0.5),
        ("\\frac{-1}{2}", -0.5),
        ("2\\frac{1}{2}", 2.5),
        ("2 1/2", 2.5),
        ("-2 1/2", -2.5),
        ("29/3.", 29 / 3),
        ("3 / 4", 4),
        ("(1+2)/3", 3),
        ("1 x 10^3", 1000),
        ("2 \\times 10^{3}", 2000),
        ("2.5*10^-3", 0.0025),
        ("10^6", 1000000.0),
        ("10**3", 1000),
        ("25 cm^2", 25),
        ("25 cm^{2}", 25),
        ("9.8 m/s^{-2}", 9.8),
        ("25 m²", 25),
        ("1,00,000", 100000),
        ("₹1,00,000", 100000),
        ("12.", 12),
        ("...5", 5),
        ("1e999", None),
        ("1e-999", 0),
        ("5/0", None),
        ("\\boxed{42}", 42),
        ("\\boxed{\\frac{3}{4}}", 0.75),
        ("#### 1,234", 1234),
        ("50%", 50),
        ("Apples - 5", 5),
        ("Options:\n- 5", 5),
        ("US$5", 5),
        ("-$1,234.50", -1234.5),
        ("4 - -5", -5),
        ("4 - (-5)", -5),
        ("1 000 000.", 1000000.0),
        ("12 34 567", 34567),
        ("5 3000", 3000),
        ("2019 300", 300),
        ("<<2*3=6>>6", 6),
        ("6 apples and 1/3 of 9", 9),
        ("x = -3.5e2", -350),
        ("the answer is -3 degrees", -3),
        ("loss of - $40", -40),
        ("from 3 to -5", -5),
        ("A1", 1),
        ("x^2", None),
        ("24/7", 24 / 7),
        ("1.5/3", 0.5),
        ("1,000/4", 250),
        ("5e3x", 3),
        ("2e3 dollars", 2000),
        ("\\$5", 5),
        ("+5", 5),
        ("0.0005", 0.0005),
        ("-\\$5", -5),
        ("He bought 5 200-page books", 200),
        ("4 400-meter laps", 400),
        ("1 200 300-page books", 300),
        ("a 1 000-page book", 1000),
        ("1 000-1 500", 1500),
        ("2^10", 1024),
        ("2**10", 1024),
        ("2^{10} = 1024", 1024),
        ("2^-1", 0.5),
        ("-2^2", -4),
        ("5 x 3^2", 9),
        ("4,10^2", 100),
        ("2^x", 2),
        ("0^-1", None),
        ("9^99999", None),
    ],
)
def test_numbers_are_read_as_people_write_them(text, number):
    assert extract_answer("gsm8k", text) == (number if number is None else pytest.approx(number, rel=1e-12, abs=0))


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
        ("#### C", "C"),
        ("5 + 5 = 10\n#### C", "C"),
        ("answer -> D", "D"),
        ("Answer \u2192 D", "D"),
        ("Answer - B", "B"),
        ("The answer is clearly B", "B"),
        ("The answer is indeed B", "B"),
        ("The answer here is B", "B"),
        ("I would choose C because it is right", "C"),
        ("I'd go with option (C), as it is right", "C"),
        # Capital letters that are no answer.
        ("A. 5\nB. 6\nC. 7\nThe answer is 6", None),
        ("A: A: 5\nB: 6\nC: 7\nThe answer is 6", None),
        ("A. It is not (B), as 5 km is less than A", "A"),
        ("I choose a train", None),
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


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is not (C)", None),
        ("Option B is incorrect", None),
        ("A is the answer to B", "A"),
        ("The answer is not A but B", "B"),
        ("the answer is c", "C"),
        ("the answer is c.", "C"),
        ("The answer is not A, but rather (B).", "B"),
        ("the answer is a multiple of 5", None),
        ("the answer is a", "A"),
        ("the answer is a.", "A"),
        ("The answer is e^2", None),
        ("The answer isn't (C).", None),
        ("The answer isn\u2019t C.", None),
        ("The answer cannot be B", None),
        ("The answer can't be B, so the answer is D.", "D"),
        ("This rules out (A) and (B). The answer is C", "C"),
        ("This rules out (A) and (B).", None),
        ("(A) is wrong, (B) is wrong, (C) is correct, (D) is wrong", "C"),
        ("B is not incorrect", "B"),
        ("B isn't wrong", "B"),
        ("Neither (A) nor (B) is correct", None),
        ("Neither A nor B is correct, so (C)", "C"),
        ("The answer is B. Wait, no: the answer is C", "C"),
        ("The answer is B. Wait, no, it is C.", "C"),
        ("The answer is B. Actually, C.", "C"),
        ("The answer is (B). But (B) is wrong.", None),
        ("B is incorrect at first sight, yet the answer is B", "B"),
        ("I cannot choose between (A) and (B)", None),
        ("I'm not sure whether the answer is (A) or (B).", None),
        ("If the answer is A, then x = 3. So the answer is B", "B"),
        ("Is the answer (B)? No.", None),
        ("I don't think the answer is (C).", None),
        ("I do not believe that the answer is C; it must be (D)", "D"),
        ("(A) 1 (B) 2 (C) 3 (D) 4 (E) 5", None),
        ("(C) is not the correct answer", None),
        ("(C) can be eliminated", None),
        ("Option C can be ruled out", None),
        ("eliminate B and C; the answer is A", "A"),
        ("We eliminated (A), (B), (C) and (E), which leaves (D).", "D"),
        ("All options except (C) are wrong", "C"),
        ("Every option other than C is wrong.", "C"),
        ("The incorrect answer is (B)", None),
        ("Answer: C. Not B.", "C"),
        ("The answer is B, not C", "B"),
        ("The answer is C rather than D.", "C"),
        ("B does not fit", None),
        ("B doesn't work, so C", "C"),
        ("It is not B. It is C.", "C"),
        ("It's not B, it's C.", "C"),
        ("option b is correct", "B"),
        ("The correct option is (c)", "C"),
        ("answer: c) 5", "C"),
        ("Final answer: d", "D"),
        ("The answer to this question is C", "C"),
        ("The answer to the question is therefore C", "C"),
        ("I can't answer that: the options are (A) 5 and (B) 6.", None),
        ("(B) is wrong. (C) is right.", "C"),
        ("(A) is the best answer.", "A"),
        ("The answer is (A) because (B) is too small", "A"),
        ("None of (A), (B) and (C) is right", None),
        ("A and B are wrong. The answer: E", "E"),
        ("(B) could be the answer, but it isn't. The answer is (D)", "D"),
        ("A. 5 km", "A"),
        ("(B) is incorrect", None),
        ("Not C", None),
        ("The answer is none of these, E", None),
        ("The answer is [D]", "D"),
        ("The answer is \u201cD\u201d", "D"),
        ('The answer is "D"', "D"),
        ("answer = d", "D"),
        ("b", "B"),
        ("The answer is: \n\n(E)", "E"),
        ("\\boxed{D}", "D"),
        ("$\\boxed{\\mathrm{D}}$", "D"),
        ("The answer must be D", "D"),
        ("D must be the answer", "D"),
        ("D is the only correct option", "D"),
        ("The answer is (A) or (B)", None),
        ("the answer is either A or B", None),
        ("the answer is b because 5", "B"),
        ("The answer is C - 62", "C"),
        ("We add 5. No, C.", "C"),
        ("it is a train", None),
        ("It is A man", None),
        ("Let it be C", None),
        ("that is A", "A"),
        ("Hence, (D) is false. So (C) is true.", "C"),
        ("You can't eliminate B", None),
        ("the answer cannot be determined, so (E)", "E"),
        ("The answer isn't A or B, it's C", "C"),
        ("Not A. Not B. C.", None),
        ("Answer:C", "C"),
        ("ANSWER: (C)", "C"),
        ("ANSWER IS C", "C"),
        ("The answer is A, B is too big", "A"),
        ("the answer is D and B is wrong", "D"),
        ("Answer: E is correct", "E"),
        ("The answer is e.g. 5", None),
        ("The answer is e.g 5", None),
        ("The answer is A.M.", None),
        ("The answer is C.I would add 5", "C"),
        ("The answer is a, b, or c", None),
        ("The answer is A, B or C.", None),
        ("The answer is (A), (B), or option (C).", None),
        ("Since it is a: 5, so D", "D"),
        ("Not B, because it is C", "C"),
        ("Since the answer is C, 5 is left", "C"),
        ("I would choose A or B", None),
        ("I would choose between A and B", None),
        ("I would not choose C", None),
        ("I do not think I would choose C", None),
        ("The answer is -B", None),
    ],
)
def test_letter_that_is_denied_asked_for_or_taken_back_is_no_answer(text, letter):
    assert extract_answer("AQuA", text) == letter


@untimed
@given(
    st.sampled_from("ABCDE"), st.text(max_size=60), st.sampled_from(["The answer is ({}).", "answer: {}", "answer {}"])
)
def test_explanation_before_the_stated_letter_does_not_matter(letter, text, spelling):
    assert is_correct("AQuA", f"{text}\n{spelling.format(letter)}", letter)


LOOPS = """
from rosa.evaluation.tasks import extract_answer
for size in (20_000, 200_000):
    for piece in ("9", ",000", ",00", "1/", "1 ", " 000", " 200-", "10^", "2^", "-"):
        extract_answer("gsm8k", "1" + (piece * size)[:size])
    for piece in ("(", '["', "\\n", "answer ", "answer - ", "I choose ", "A) nor (", "A,   ", "A. B. "):
        extract_answer("AQuA", "The answer is " + (piece * size)[:size])
"""


def test_long_loops_of_a_model_are_read_in_linear_time():
    # Some seconds; in quadratic time the larger size would take far more than the limit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOOPS], cwd=ROOT, env=environment, check=True, timeout=300)


# Texts, and what cannot be judged


def test_texts_are_compared_without_case_spacing_and_full_stop():
    task = Task("own", "text")
    assert extract_answer(task, "  The  blue\nbird. ") == "The blue bird"
    assert is_correct(task, "the blue bird", "The blue  Bird.")
    assert not is_correct(task, "the bird", "the blue bird")


@pytest.mark.parametrize(
    ("task", "answer", "truth"),
    [
        ("gsm8k", "1,234.5", 1234.5),
        ("gsm8k", " -$5 ", -5),
        ("gsm8k", "1 000", 1000),
        ("gsm8k", "1.5e3", 1500),
        ("gsm8k", "3/4", 0.75),
        ("gsm8k", "2 \\frac{1}{2}", 2.5),
        ("AQuA", " B\n", "B"),
        ("boolq", "TRUE", "true"),
        (Task("own", ("Not sure", "no")), "not  sure", "Not sure"),
        (Task("own", "text"), " a  b.", "a b"),
    ],
)
def test_truth_is_read_in_its_forms(task, answer, truth):
    assert read_truth(task, answer) == truth


@pytest.mark.parametrize("text", ["^2", "5/0", "1e999", "3, 4", "7 - 5", "5%", "1/2/3", "five", "--5", "5 km"])
def test_truth_that_is_more_or_less_than_a_number_is_an_error(text):
    with pytest.raises(ValueError, match="`answer` must be a number such as 1,234.5, got"):
        read_truth("gsm8k", text)


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        ("AQuA", "b", "must be a letter"),
        ("AQuA", "(B)", "must be a letter"),
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
