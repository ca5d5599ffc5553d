"""The eight commonsense benchmarks, in LLM-Adapters' wording (Hu et al. 2023, arXiv 2304.01933)."""

from __future__ import annotations

from collections.abc import Sequence

from rosa.evaluation.tasks.task import HubData, Task

# These two are scripts on the hub's main branch.
_PARQUET = "refs/convert/parquet"


def _boolq(row: dict) -> dict:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return {"instruction": f"{question}\n\nAnswer format: true/false", "answer": str(row["answer"]).lower()}


def _piqa(row: dict) -> dict:
    solutions = f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}"
    return {
        "instruction": f"Please choose the correct solution to the question: {row['goal']}\n\n{solutions}\n\n"
        "Answer format: solution1/solution2",
        "answer": f"solution{row['label'] + 1}",
    }


def _social_i_qa(row: dict) -> dict:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(f"{row['context']} {row['question']}", choices, int(row["label"]))


def _arc(row: dict) -> dict:
    # Labels are A to E in most rows, 1 to 4 in some.
    return _question(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]) + 1)


def _openbookqa(row: dict) -> dict:
    return _arc({**row, "question": row["question_stem"]})


def _hellaswag(row: dict) -> dict:
    start = f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}"
    return _choice(start, "ending", row["endings"], int(row["label"]) + 1)


def _winogrande(row: dict) -> dict:
    start = "Please choose the correct answer to fill in the blank to complete the given sentence:"
    return {
        "instruction": f"{start} {row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} "
        "Answer format: option1/option2",
        "answer": f"option{row['answer']}",
    }


def _question(question: str, choices: Sequence[str], answer: int) -> dict:
    return _choice(f"Please choose the correct answer to the question: {question}", "answer", choices, answer)


def _choice(start: str, name: str, choices: Sequence[str], answer: int) -> dict:
    numbers = range(1, len(choices) + 1)
    listed = " ".join(f"{name.capitalize()}{number}: {text}" for number, text in zip(numbers, choices, strict=True))
    options = "/".join(f"{name}{number}" for number in numbers)
    return {"instruction": f"{start}\n\n{listed}\n\nAnswer format: {options}", "answer": f"{name}{answer}"}


def _options(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{number}" for number in range(1, count + 1))


COMMONSENSE = (
    Task("boolq", ("true", "false"), HubData("google/boolq", "validation", 3270, _boolq)),
    Task("piqa", _options("solution", 2), HubData("ybisk/piqa", "validation", 1838, _piqa, revision=_PARQUET)),
    Task(
        "social_i_qa",
        _options("answer", 3),
        HubData("allenai/social_i_qa", "validation", 1954, _social_i_qa, revision=_PARQUET),
    ),
    # ARC has a few questions of three and of five choices.
    Task("ARC-Challenge", _options("answer", 5), HubData("allenai/ai2_arc", "test", 1172, _arc, "ARC-Challenge")),
    Task("ARC-Easy", _options("answer", 5), HubData("allenai/ai2_arc", "test", 2376, _arc, "ARC-Easy")),
    Task("openbookqa", _options("answer", 4), HubData("allenai/openbookqa", "test", 500, _openbookqa, "main")),
    Task("hellaswag", _options("ending", 4), HubData("Rowan/hellaswag", "validation", 10042, _hellaswag)),
    Task(
        "winogrande",
        _options("option", 2),
        HubData("allenai/winogrande", "validation", 1267, _winogrande, "winogrande_xl"),
    ),
)
