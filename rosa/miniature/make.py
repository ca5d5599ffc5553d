"""The miniature on disk: a base model that knows the seen skills, and the unseen ones as data to train and test on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rosa.miniature.base import BaseRecipe, base_model
from rosa.miniature.skills import SEEN, UNSEEN, draw_rows
from rosa.miniature.training import Schedule

SEEN_TASK = "seen"


def _base_recipe() -> BaseRecipe:
    return BaseRecipe(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        # With 0.09, as at the demo's width, copying a list was not learnt.
        initializer_range=0.04,
        # The slowest pair turns once in 4,000 positions, some 80 times the longest row. Large models are built so too:
        # 13 times the context in Llama-2, 155 times in Qwen2.5.
        rope_theta=1000.0,
        schedule=Schedule(steps=5000, batch_size=16, learning_rate=1.5e-3),
    )


@dataclass(frozen=True)
class MiniatureRecipe:
    """How large the miniature is; the same recipe gives the same rows.

    Args:
        base (BaseRecipe): shape and training of the base model.
        base_rows (int): rows of the seen skills that the base is trained on.
        train_rows (int): rows to train methods on, of all unseen skills together.
        test_rows (int): test rows of each unseen skill.
        seen_rows (int): test rows of all seen skills together.
        seed (int): of the rows, the base's first weights and its batches.
    """

    base: BaseRecipe = field(default_factory=_base_recipe)
    base_rows: int = 80_000
    train_rows: int = 2_400
    test_rows: int = 100
    seen_rows: int = 200
    seed: int = 0


class Miniature(NamedTuple):
    """Where the parts of a miniature are.

    Attributes:
        model (Path): folder of the base model and its tokenizer.
        data (Path): the unseen skills' training rows, a .json file.
        data_dir (Path): holds NAME/test.json and NAME/task.json for each task.
        tasks (tuple of str): the unseen skills, and last "seen": a mixture of the seen ones, to see what is
            forgotten.
    """

    model: Path
    data: Path
    data_dir: Path
    tasks: tuple[str, ...]


def make(folder: Path, recipe: MiniatureRecipe | None = None) -> Miniature:
    """The miniature of this recipe: made now, or found in the folder where an earlier run made it.

    Args:
        folder (Path): folder for models and data; made if need be.
        recipe (MiniatureRecipe, optional): for another size.

    Returns:
        Miniature: its parts, all below `folder`.
    """
    recipe = recipe or MiniatureRecipe()
    rng = random.Random(recipe.seed)
    seen = draw_rows(SEEN, recipe.seen_rows, rng)
    base_rows = draw_rows(SEEN, recipe.base_rows, rng, without=seen, distinct=False)
    data_dir = _write_data(Path(folder), seen, recipe, rng)
    model = base_model(base_rows, recipe.base, recipe.seed, Path(folder))
    return Miniature(model, data_dir / "train.json", data_dir, (*UNSEEN, SEEN_TASK))


def _write_data(folder: Path, seen: list[dict], recipe: MiniatureRecipe, rng: random.Random) -> Path:
    """Write the unseen skills' training rows, and each task's test rows and its description."""
    # All of a seen row's output counts: of a worked problem every step.
    files = {f"{SEEN_TASK}/test.json": [{**row, "answer": row["output"]} for row in seen]}
    files[f"{SEEN_TASK}/task.json"] = {"answer": "text"}
    tests: list[dict] = []
    for name, skill in UNSEEN.items():
        rows = draw_rows({name: skill}, recipe.test_rows, rng)
        tests += rows
        files[f"{name}/test.json"] = rows
        files[f"{name}/task.json"] = {"answer": skill.form}
    files["train.json"] = draw_rows(UNSEEN, recipe.train_rows, rng, without=tests)

    texts = {name: json.dumps(content, indent=1) + "\n" for name, content in files.items()}
    data = folder / f"data-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Only a whole folder gets the name that a later run looks for.
        with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
            for name, text in texts.items():
                path = Path(unfinished) / "data" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            os.rename(Path(unfinished) / "data", data)
    return data
