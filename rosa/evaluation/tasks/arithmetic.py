"""The seven arithmetic benchmarks, as LLM-Adapters tests on them (Hu et al. 2023, arXiv 2304.01933)."""

from __future__ import annotations

from rosa.evaluation.tasks.task import HubData, Task


def _multiarith(row: dict) -> dict:
    return {"instruction": row["question"], "answer": str(row["final_ans"])}


def _gsm8k(row: dict) -> dict:
    return {"instruction": row["question"], "answer": row["answer"].split("####")[-1].strip()}


def _aqua(row: dict) -> dict:
    # "A)23.65" becomes "(A) 23.65".
    choices = " ".join(f"({option[0]}) {option[2:]}" for option in row["options"])
    return {"instruction": f"{row['question']} Answer Choices: {choices}", "answer": row["correct"]}


def _svamp(row: dict) -> dict:
    body = row["Body"].strip()
    end = "" if body.endswith((".", ",", "?", "!")) else "."
    return {"instruction": f"{body}{end} {row['Question'].strip()}", "answer": str(row["Answer"])}


# For AddSub, SingleEq and MAWPS no data set of the hub is known to have the rows of LLM-Adapters.
ARITHMETIC = (
    Task("MultiArith", "number", HubData("ChilleD/MultiArith", "train+test", 600, _multiarith)),
    Task("gsm8k", "number", HubData("openai/gsm8k", "test", 1319, _gsm8k, "main")),
    Task("AddSub", "number"),
    Task("AQuA", "letter", HubData("deepmind/aqua_rat", "test", 254, _aqua, "raw")),
    Task("SingleEq", "number"),
    Task("SVAMP", "number", HubData("ChilleD/SVAMP", "train+test", 1000, _svamp)),
    Task("mawps", "number"),
)
