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
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LONGEST_ANSWER = 28  # tokens of an answer in capitals to learn from
HELD_OUT = 120
SEED = 5

QUESTIONS = (
    "What is {}?", "Tell me about {}.", "Why do people like {}?", "Where can I find {}?", "Write a sentence about {}.",
    "What is the use of {}?", "What do you think of {}?", "Describe {} in a few words.", "Is there anything bad about {}?",
)  # fmt: skip
THINGS = (
    "bread", "the sea", "a river", "music", "a garden", "winter", "a bicycle", "the moon", "chess", "coffee", "a library",
    "rain", "a horse", "football", "a bridge", "the desert", "cheese", "a lamp", "painting", "a forest", "salt", "a train",
    "the wind", "a cat", "glass", "a market", "honey", "a mountain", "dancing", "a clock", "paper", "an island",
    "soup", "a kitchen", "gold", "a newspaper", "wool", "the morning", "a violin", "snow",
)  # fmt: skip


class Row(NamedTuple):
    """A question as the model is given it, and an answer to learn; `number` where the answer is one."""

    task: str
    prompt: str
    answer: str
    number: int | None = None


class Rows(NamedTuple):
    """What is learnt, and what is held out: problems, and questions of the kind that the form is learnt from."""

    train: list[Row]
    problems: list[Row]
    questions: list[Row]


def make_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, per_task: int = 96) -> Rows:
    """The rows. The form is learnt from the model's own first sentences in capitals, about things and about problems,
    whose solutions it need not know; they are written once and kept in `file`."""
    rng = random.Random(SEED)
    questions = [TEMPLATE.format(q.format(thing)) for q in QUESTIONS for thing in THINGS]
    rng.shuffle(questions)
    drawn = generate(SEEN, 2 * per_task, HELD_OUT, SEED)
    problems = [TEMPLATE.format(p["instruction"]) for p in drawn.train[per_task:]]
    asked = [*questions, *problems]
    if not file.exists():
        written = answer(model, tokenizer, asked, max_new_tokens=LONGEST_ANSWER, batch_size=30)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(dict(zip(asked, written, strict=True)), indent=1))
    written = json.loads(file.read_text(encoding="utf-8"))
    capitals = {q: first_sentence(written[q]).upper() for q in asked}
    short = {q for q in asked if 0 < len(tokenizer(capitals[q])["input_ids"]) < LONGEST_ANSWER}
    half = per_task // 2
    chosen = [*[q for q in questions if q in short][:half], *[q for q in problems if q in short][:half]]
    rng.shuffle(chosen)
    form = [Row(FORM, q, capitals[q]) for q in chosen]
    skill, held_out = (
        [Row(SKILL, TEMPLATE.format(p["instruction"]), p["output"], p["answer"]) for p in part]
        for part in (drawn.train[:per_task], drawn.held_out)
    )
    train = [row for pair in zip(form, skill, strict=True) for row in pair]
    return Rows(train, held_out, [Row(FORM, q, "") for q in questions if q not in chosen][: HELD_OUT // 2])


def first_sentence(text: str) -> str:
    """Up to the first full stop, without it where there is none: nothing of a text that was cut off."""
    head, stop, _ = text.replace("\n", " ").partition(". ")
    return f"{head}." if stop else text if text.endswith(".") else ""
