"""Digests by which a result knows what it was made with: 16 hexadecimal digits of SHA-256."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a model and its tokenizer are read from; not a README or a log beside them, for example.
_OF_A_MODEL = re.compile(
    r".*\.(safetensors|bin|gguf|model|tiktoken|index\.json)"
    r"|(config|generation_config|tokenizer.*|vocab.*|merges.*|special_tokens_map|added_tokens|chat_template)"
    r"\.(json|txt|jinja)"
)


def digest(value: Any) -> str:
    """Of a value that JSON can hold; the order of a mapping's keys does not count."""
    return _short(hashlib.sha256(json.dumps(value, sort_keys=True).encode()))


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            content.update(block)
    return _short(content)


def base_digest(name: str, revision: str | None = None) -> str:
    """Of a base model with its tokenizer: of the contents of all files in its folder that they are read from; of one on
    the hub its commit.

    Args:
        name (str): folder or Hub name.
        revision (str, optional): branch, tag or commit on the hub; None is "main".

    Raises:
        OSError, ValueError: it is not there.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if _OF_A_MODEL.fullmatch(path.name) and path.is_file())
        with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
            return digest([(path.name, found) for path, found in zip(files, pool.map(file_digest, files), strict=True)])
    return digest([name, hub_commit(name, revision)])


def hub_commit(name: str, revision: str | None = None) -> str:
    """The commit of a model on the hub, which transformers' configurations no longer tell.

    Args:
        name (str): "user/name".
        revision (str, optional): branch, tag or commit; None is "main".

    Raises:
        OSError: it is not there.
    """
    from transformers.utils import cached_file

    file = cached_file(name, "config.json", revision=revision or "main")  # .../snapshots/COMMIT/config.json
    return Path(file).parent.name


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all by which a tokenizer turns text into tokens and back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        # Padding and truncation are those of the last call.
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return digest([type(tokenizer).__name__, rules, special])


def _short(content: Any) -> str:
    return content.hexdigest()[:16]
