"""Base models and their tokenizers, from a folder or from the hub; what is wrong with one is told by name."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rosa.adapters.folder import has_adapter
from rosa.models.quantizing import quantization
from rosa.storage.digest import hub_commit
from rosa.storage.parsing import parse_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

_TOKENIZER_CONFIG = "tokenizer_config.json"


def load_model(
    name: str | os.PathLike,
    dtype: str = "auto",
    *,
    load_in: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """A causal language model.

    Args:
        name (str or path): folder or Hub name.
        dtype (str): of its parameters; "auto" as they were saved.
        load_in (str, optional): "4bit" or "8bit" quantizes the linear layers of its decoder while they are loaded; None
            leaves them as they were saved.
        attn_implementation (str, optional): attention back end; None takes that of its configuration, or transformers'
            choice.
        revision (str, optional): branch, tag or commit on the hub; None is "main".
        device_map (str or dict, optional): as transformers takes it; None leaves the model on the CPU.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file in it is missing or damaged, no causal language model can be made of it, it was saved while
            RoSA's adapter was in it, it has no such attention here, or it is to be quantized and is quantized already.
        ImportError: no package that quantizes is there.
    """
    from transformers import AutoModelForCausalLM

    _refuse_patched(Path(name))
    # A folder by its whole path, which the adapters will name and which is found from everywhere.
    source = os.path.abspath(name) if Path(name).is_dir() else name
    settings = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    settings["revision"] = revision or "main"
    if load_in is not None:
        settings["quantization_config"] = quantization_of(name, load_in, revision)
    with _faults_told(name, "model"):
        model = AutoModelForCausalLM.from_pretrained(source, **settings)
        if not Path(name).is_dir():
            model.config._commit_hash = hub_commit(os.fspath(name), revision)  # for the adapters that it will have
    return model


def load_shapes(name: str | os.PathLike, *, attn_implementation: str | None = None) -> PreTrainedModel:
    """A causal language model on the meta device: shapes, and no weights. Of the model its configuration alone is read.

    Args, Raises: as of `load_model`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _faults_told(name, "model"):
        config = AutoConfig.from_pretrained(name)
        settings = {"dtype": config.dtype or torch.float32, "attn_implementation": attn_implementation}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **settings)


def quantization_of(name: str | os.PathLike, load_in: str, revision: str | None = None) -> QuantizationConfigMixin:
    """How transformers is to quantize a base: of the base itself its configuration alone is read.

    Args:
        name (str or path): folder or Hub name.
        load_in (str): "4bit" or "8bit".
        revision (str, optional): branch, tag or commit on the hub; None is "main".

    Raises:
        FileNotFoundError, ValueError, ImportError: as `load_model` does for what is wrong with this.
    """
    from transformers import AutoConfig

    with _faults_told(name, "model"):
        found = getattr(AutoConfig.from_pretrained(name, revision=revision or "main"), "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ValueError(f"{name} was saved quantized ({method}), so load_in {load_in} has nothing to do: leave it out")
    return quantization(load_in)


def load_tokenizer(
    name: str | os.PathLike, *, revision: str | None = None, beside: Iterable[Path] = ()
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name (str or path): folder or Hub name of the model.
        revision (str, optional): branch, tag or commit on the hub; None is "main".
        beside (iterable of Path): folders of adapters; the first that holds a tokenizer gives it, as the adapter was
            trained with that.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file in it is missing or damaged.
    """
    from transformers import AutoTokenizer

    of_adapter = next((folder for folder in beside if (folder / _TOKENIZER_CONFIG).is_file()), None)
    name = name if of_adapter is None else of_adapter
    with _faults_told(name, "tokenizer", refuses_adapters=of_adapter is None):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=(of_adapter is None and revision) or "main")
    files, folder = set(tokenizer.vocab_files_names.values()), Path(name)
    # transformers makes an empty one where there are no files.
    if folder.is_dir() and files and not any((folder / file).is_file() for file in {*files, "tokenizer.json"}):
        raise ValueError(f"{name} holds no tokenizer: there is none of {', '.join(sorted(files))}")
    return tokenizer


def _refuse_patched(folder: Path) -> None:
    """Refuses what `save_pretrained` made of patched models before it saved their adapters: transformers would load it
    without RoAE, but with the norms that were trained."""
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                patched = any(".roae." in name for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            continue  # told of when it is loaded
        if patched:
            raise ValueError(
                f"{folder} was written by save_pretrained of a model that RoSA had patched ({path.name}): its norms "
                "are tuned. Load the base itself, and the adapter from a folder that rosa.save_adapter wrote"
            )


@contextmanager
def _faults_told(name: str | os.PathLike, what: str, *, refuses_adapters: bool = True) -> Iterator[None]:
    folder = Path(name)
    looks_like_a_path = os.fspath(name).startswith((".", "/", "~")) or os.fspath(name).count("/") > 1
    if looks_like_a_path and not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {name} to load a {what} from")
    if refuses_adapters and has_adapter(folder):  # which transformers would load on top of whatever base it names
        raise ValueError(
            f"{name} holds an adapter: give the model that it was made for, and this folder as the adapter"
        )
    try:
        yield
    except Exception as error:
        damage = _damage(folder) if folder.is_dir() else None
        if damage is not None:
            raise ValueError(f"the {what} in {name} cannot be loaded: {damage}") from error
        if isinstance(error, (OSError, ValueError, ImportError)):  # the last for an attention that is not installed
            raise ValueError(f"no {what} can be loaded from {name}: {error}") from error
        raise


def _damage(folder: Path) -> str | None:
    """The first file of a model's folder that cannot be read, and why."""
    for path in sorted(folder.iterdir()):
        reason = _unreadable(path)
        if reason is not None:
            return f"{path.name} {reason}"
    return None


def _unreadable(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f"is truncated or no safetensors file ({error})"
    if path.suffix == ".bin" and not zipfile.is_zipfile(path):
        return "is truncated or no file of PyTorch's"
    if path.suffix == ".json":
        try:
            parse_object(path.read_bytes())
        except (ValueError, OSError) as error:
            return f"is damaged: {error}"
    return None
