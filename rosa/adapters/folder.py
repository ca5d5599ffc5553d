"""An adapter's folder: `adapter_model.safetensors`, `rosa_config.json`, a model card, and a note for transformers.

The configuration stands in the weights' own metadata too, so that replacing that one file replaces the adapter: a
process that is killed while it saves leaves the old adapter or the new one. `rosa_config.json` is the copy for people
and for the hub. The note is a `config.json` that has `from_pretrained` say what to do instead.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from rosa.adapters.card import MARK, model_card
from rosa.errors import AdapterError
from rosa.storage.files import replace_files
from rosa.storage.parsing import parse_object

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "rosa_config.json"
PEFT_CONFIG_NAME = "adapter_config.json"  # peft's, and RoSA's in older folders
CARD_NAME = "README.md"
NOTE_NAME = "config.json"
FORM_NAME = "prompt_form.json"  # how its prompts are written, where `rosa train` trained it
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "*.model",
)  # fmt: skip

ADAPTER_TYPE = "rosa"
FORMAT_VERSION = 1
_KEY = "adapter_config"  # of the weights' metadata
_DTYPES = ("F32", "F64", "BF16", "F16")
_MODEL_FILES = (
    "model*.safetensors*", "pytorch_model*.bin*", "consolidated*.*", "model*.pth", "*.gguf", "tf_model*.h5",
)  # fmt: skip
NOTE = {
    "adapter_type": ADAPTER_TYPE,
    # What transformers says that it does not know.
    "model_type": "RoSA adapter, not a model: load its base with from_pretrained, then rosa.load_adapter(base, folder)",
    # AutoTokenizer looks for a part without a type, and would warn of the type above if it found none.
    "tokenizer": {"model_type": ""},
}


class StoredAdapter(NamedTuple):
    """An adapter on disk, of which nothing but the header has been read."""

    description: dict[str, Any]
    file: safe_open

    def mismatch(self, expected: Mapping[str, tuple[int, ...]]) -> str | None:
        """The first thing, in words, in which the tensors differ from those of the names and shapes expected."""
        stored = dict.fromkeys(self.file.keys())
        for name, shape in expected.items():
            if name not in stored:
                return f"{name} is missing"
            tensor = self.file.get_slice(name)
            if tensor.get_shape() != list(shape):
                return f"{name} is {tensor.get_shape()}, expected {list(shape)}"
            if tensor.get_dtype() not in _DTYPES:
                return f"{name} holds {tensor.get_dtype()}, expected one of {', '.join(_DTYPES)}"
        return next((f"{name} has no place in the model" for name in stored if name not in expected), None)

    def tensor(self, name: str) -> Tensor:
        """The values of one tensor."""
        return self.file.get_tensor(name)


@contextmanager
def open_adapter(folder: Path) -> Iterator[StoredAdapter]:
    """RoSA's adapter in a folder, to be read in the block.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterError: the weights are damaged, or carry no description of an adapter of RoSA's.
    """
    config, weights = _files(folder)
    try:
        with safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY, "")
            try:
                description = parse_object(text)
            except ValueError as error:
                raise AdapterError(f"{weights} carries no RoSA configuration in its metadata: {error}") from error
            if not isinstance(description.get("base"), dict):
                raise AdapterError(f"{weights} carries a RoSA configuration without a base")
            if config.read_bytes().strip() != text.encode("utf-8", errors="replace"):
                warnings.warn(
                    f"{config} differs from the configuration stored with the weights, which is used", stacklevel=4
                )
            yield StoredAdapter(description, file)
    except SafetensorError as error:
        raise AdapterError(f"{weights} is truncated or no safetensors file: {error}") from error


def write_adapter(folder: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes an adapter's folder, which is made if need be; a card or a `config.json` of somebody else's stays.

    Raises:
        OSError: the files cannot be written. An adapter that was there is whole.
    """
    text = json.dumps(description, indent=2)
    card, note = folder / CARD_NAME, folder / NOTE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents = {}
        if not card.exists() or is_our_card(card.read_bytes()):
            contents[card] = model_card(description, tensors).encode("utf-8")
        if not note.exists() or is_note(note.read_bytes()):
            contents[note] = (json.dumps(NOTE, indent=2) + "\n").encode("utf-8")
        contents[folder / CONFIG_NAME] = (text + "\n").encode("utf-8")
        # Last, which makes it the new adapter. One key of metadata: safetensors writes several in any order, and equal
        # adapters should be equal files.
        contents[folder / WEIGHTS_NAME] = save(tensors, metadata={_KEY: text})
        replace_files(contents)
        (folder / PEFT_CONFIG_NAME).unlink(missing_ok=True)  # of the adapter that was here
    except OSError as error:
        raise OSError(f"the adapter could not be saved in {folder}: {error}. One that was there is whole") from error


def write_peft_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes an adapter's folder as peft has it, which is made if need be, without a card.

    Raises:
        OSError: the files cannot be written. An adapter that was there is whole.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = (json.dumps(config, indent=2) + "\n").encode("utf-8")
        weights = save(tensors, metadata={"format": "pt"})  # which makes it the new adapter
        replace_files({folder / PEFT_CONFIG_NAME: content, folder / WEIGHTS_NAME: weights})
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # of the adapter that was here, as are the next two
        _remove_note(folder)
        card = folder / CARD_NAME
        if card.is_file() and is_our_card(card.read_bytes()):
            card.unlink()
    except OSError as error:
        raise OSError(f"the adapter could not be saved in {folder}: {error}. One that was there is whole") from error


def has_adapter(folder: str | os.PathLike) -> bool:
    """Whether the folder holds an adapter, RoSA's or peft's, or part of one."""
    return any((Path(folder) / name).exists() for name in (WEIGHTS_NAME, CONFIG_NAME, PEFT_CONFIG_NAME))


def remove_adapter(folder: Path) -> None:
    """Removes the adapter in a folder, RoSA's or peft's, whole or in part, if there is one; not its card."""
    for name in (WEIGHTS_NAME, CONFIG_NAME, PEFT_CONFIG_NAME, FORM_NAME):
        (folder / name).unlink(missing_ok=True)
    _remove_note(folder)


def local_folder(source: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of an adapter, RoSA's or peft's; one on the hub is fetched first, with its tokenizer and the form of
    its prompts.

    Args:
        source (path or str): a folder, or a repository of the Hugging Face hub ("user/name").
        revision (str, optional): branch, tag or commit on the hub.
        token (str, optional): for the hub.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    name = os.fspath(source)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            files = [WEIGHTS_NAME, CONFIG_NAME, PEFT_CONFIG_NAME, FORM_NAME, *TOKENIZER_FILES]
            return Path(snapshot_download(name, allow_patterns=files, revision=revision, token=token))
        except Exception as error:
            raise FileNotFoundError(f"{name} is neither a folder here nor to be had from the hub: {error}") from error
    raise FileNotFoundError(f"there is no adapter folder {name}")


def is_peft(folder: Path) -> bool:
    """Whether the adapter in a folder is peft's and not RoSA's."""
    config = folder / PEFT_CONFIG_NAME
    if not config.is_file() or _is_ours(folder / WEIGHTS_NAME):
        return False
    try:
        return parse_object(config.read_bytes()).get("adapter_type") != ADAPTER_TYPE
    except ValueError:
        return True


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder says of its adapter, RoSA's or peft's.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it is damaged; the message names the file.
    """
    if not is_peft(folder):
        with open_adapter(folder) as stored:
            return stored.description
    _files(folder)  # raises where one is missing
    config = folder / PEFT_CONFIG_NAME
    try:
        return parse_object(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config} is damaged: {error}") from error


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a folder says of its adapter, RoSA's or peft's, and the adapter's tensors by the names in the file.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it is damaged; the message names the file.
    """
    description = read_description(folder)
    try:
        return description, load_file(folder / WEIGHTS_NAME)
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS_NAME} is truncated or no safetensors file: {error}") from error


def refuse_model_folder(folder: Path) -> None:
    """Raises ValueError where a folder holds a model, among whose files no others must stand."""
    file = model_in(folder)
    if file is not None:
        raise ValueError(f"{folder} holds a model ({file}): choose another folder")


def model_in(folder: Path) -> str | None:
    """The first file that makes a folder a model's, or None."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return model_file(names, (folder / NOTE_NAME).read_bytes)


def model_file(names: Collection[str], read_config: Callable[[], bytes]) -> str | None:
    """The first file that makes a folder or a repository a model's, or None.

    Args:
        names (collection of str): of its files.
        read_config (callable): gives its `config.json`, where the names have one.
    """
    weights = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in _MODEL_FILES))
    if weights:
        return weights[0]
    if NOTE_NAME not in names:
        return None
    try:
        config = parse_object(read_config())
    except ValueError:
        return None
    return NOTE_NAME if {"model_type", "architectures"} & config.keys() and not _marked(config) else None


def is_note(content: bytes) -> bool:
    """Whether a `config.json` is the note that RoSA writes."""
    try:
        return _marked(parse_object(content))
    except ValueError:
        return False


def _remove_note(folder: Path) -> None:
    note = folder / NOTE_NAME
    if note.is_file() and is_note(note.read_bytes()):
        note.unlink()


def is_our_card(content: bytes) -> bool:
    """Whether a README.md is the card that RoSA writes."""
    return MARK.encode() in content


def _files(folder: Path) -> tuple[Path, Path]:
    """The configuration and the weights of an adapter."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {folder}")
    names = (CONFIG_NAME, PEFT_CONFIG_NAME)
    config = next((folder / name for name in names if (folder / name).is_file()), None)
    missing = WEIGHTS_NAME if not (folder / WEIGHTS_NAME).is_file() else None if config else CONFIG_NAME
    if missing:
        raise FileNotFoundError(f"{folder} holds no complete adapter: {missing} is missing")
    return config, folder / WEIGHTS_NAME


def _is_ours(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _marked(config: dict[str, Any]) -> bool:
    return config.get("adapter_type") == ADAPTER_TYPE
