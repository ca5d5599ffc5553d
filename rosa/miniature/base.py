"""The base model: a tokenizer and a small Qwen2 model made from generated rows, kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from rosa.data.prompts import prompt
from rosa.miniature.training import Schedule, train

EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class BaseRecipe:
    """The shape of the base model, and how it is trained."""

    hidden_size: int = 96
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    initializer_range: float = 0.09  # the usual 0.02 suits wide models; at this width it costs twice the steps
    max_position_embeddings: int = 256
    rope_theta: float = 10_000.0
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=800, batch_size=32, learning_rate=1.5e-3))


def base_model(rows: Sequence[dict], recipe: BaseRecipe, seed: int, cache: Path) -> Path:
    """The folder of a model trained on these rows: from the cache, or trained now.

    Args:
        rows (sequence of dict): the rows to train on: instruction and output.
        recipe (BaseRecipe): shape and training.
        seed (int): of the first weights and the batches.
        cache (Path): folder that holds trained bases; made if need be.

    Returns:
        Path: a folder with the model and its tokenizer.
    """
    folder = cache / _key(rows, recipe, seed)
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Only a whole folder gets the name that a later run looks for.
        with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as unfinished:
            _train_base(rows, recipe, seed, Path(unfinished) / "model")
            os.rename(Path(unfinished) / "model", folder)
    return folder


def make_tokenizer(rows: Iterable[dict]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the words of these rows; each digit is a token of its own.

    Args:
        rows (iterable of dict): instruction and output are learnt from.

    Returns:
        PreTrainedTokenizerFast: it has an end-of-sequence and a padding token, and decodes to the text it was given.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for row in rows for text in (row["instruction"], row["output"])),
        trainers.BpeTrainer(
            vocab_size=1024,
            min_frequency=5,
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # The fixed text around an instruction as one token each: it would otherwise be most of a short problem's tokens.
    before, _, after = prompt("\0").partition("\0")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (before, after)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def _key(rows: Sequence[dict], recipe: BaseRecipe, seed: int) -> str:
    """A name made of all that determines the base; the code's own text stands for how it is made."""
    code = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("base.py", "training.py")]
    parts = json.dumps([list(rows), asdict(recipe), seed, prompt("\0"), code])
    return "base-" + hashlib.sha256(parts.encode()).hexdigest()[:16]


def _train_base(rows: Sequence[dict], recipe: BaseRecipe, seed: int, folder: Path) -> None:
    tokenizer = make_tokenizer(rows)
    set_seed(seed)
    model = Qwen2ForCausalLM(_config(recipe, tokenizer))
    train("base model", model, tokenizer, rows, recipe.schedule, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    shape = {name: value for name, value in asdict(recipe).items() if name not in ("rope_theta", "schedule")}
    return Qwen2Config(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
