"""The rows of `benchmarks.composition`: questions answered in capitals, and worked word problems."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rosa.evaluation.generation import answer
from rosa.miniature.problems import SEEN, generate
from rosa.storage.files import replace_text

FORM, SKILL = "form", "skill"
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # SmolLM2's, without a system prompt
PER_TASK, HELD_OUT = 96, 120
LONGEST_ANSWER = 28  # tokens of an answer in capitals to learn from
SEED = 5

QUESTIONS = (
    "What is {}?", "Tell me about {}.", "Why do people like {}?", "Where can I find {}?", "Write a sentence about {}.",
    "What is the use of {}?", "What do you think of {}?", "Describe {} in a few words.",
    "Is there anything bad about {}?",
)  # fmt: skip
THINGS = (
    "bread", "the sea", "a river", "music", "a garden", "winter", "a bicycle", "the moon", "chess", "coffee",
    "a library", "rain", "a horse", "football", "a bridge", "the desert", "cheese", "a lamp", "painting", "a forest",
    "salt", "a train", "the wind", "a cat", "glass", "a market", "honey", "a mountain", "dancing", "a clock", "paper",
    "an island", "soup", "a kitchen", "gold", "a newspaper", "wool", "the morning", "a violin", "snow",
)  # fmt: skip


class Row(NamedTuple):
    """A question as the model is given it, an answer to learn, and the number that it is, where it is one."""

    task: str
    prompt: str
    answer: str = ""
    number: int | None = None


class Rows(NamedTuple):
    """What is learnt, the tasks by turns, and what is held out: problems, and questions about things."""

    train: list[Row]
    problems: list[Row]
    questions: list[Row]


def make_rows(file: Path) -> Rows:
    """The rows; those of the form are read from `file`, which `write_form` wrote."""
    lines = file.read_text(encoding="utf-8").splitlines()
    form = [Row(FORM, **json.loads(line)) for line in lines]
    problems = _problems()
    skill, held_out = (
        [Row(SKILL, _prompt(p), p["output"], p["answer"]) for p in part]
        for part in (problems.train[:PER_TASK], problems.held_out)
    )
    learnt = {row.prompt for row in form}
    questions = [Row(FORM, prompt) for prompt in _questions() if prompt not in learnt]
    return Rows([row for pair in zip(form, skill, strict=True) for row in pair], held_out, questions[: HELD_OUT // 2])


def write_form(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Writes the rows of the form: the model's own first sentences, in capitals. Half of them are about things, half
    about problems, which the model gets right as often as without training: they teach the form alone."""
    things, problems = _questions(), [_prompt(p) for p in _problems().train[PER_TASK:]]
    asked = [*things, *problems]
    written = answer(model, tokenizer, asked, max_new_tokens=LONGEST_ANSWER, batch_size=30)
    capitals = {prompt: _first_sentence(text).upper() for prompt, text in zip(asked, written, strict=True)}
    short = {prompt for prompt, text in capitals.items() if 0 < len(tokenizer(text)["input_ids"]) < LONGEST_ANSWER}
    half = PER_TASK // 2
    chosen = [prompt for kind in (things, problems) for prompt in [p for p in kind if p in short][:half]]
    random.Random(SEED).shuffle(chosen)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "answer": capitals[prompt]}) for prompt in chosen]
    replace_text(file, "\n".join(lines) + "\n")


def _questions() -> list[str]:
    """Questions about things, in random order."""
    questions = [TEMPLATE.format(question.format(thing)) for question in QUESTIONS for thing in THINGS]
    random.Random(SEED).shuffle(questions)
    return questions


def _problems():
    """Word problems: as many again as the skill takes are for the form."""
    return generate(SEEN, 2 * PER_TASK, HELD_OUT, SEED)


def _prompt(problem: dict) -> str:
    return TEMPLATE.format(problem["instruction"])


def _first_sentence(text: str) -> str:
    """Up to the first full stop; nothing of a sentence that was cut off."""
    head, stop, _ = text.replace("\n", " ").partition(". ")
    return f"{head}." if stop else text if text.endswith(".") else ""
