"""`rosa merge`: an adapter in the weights of its base, saved as a model of transformers that needs no RoSA."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import nn

from rosa.adapters.base import base_named_by
from rosa.adapters.config import RosaConfig
from rosa.adapters.disk import adapter_config
from rosa.adapters.folder import has_adapter, is_peft
from rosa.adapters.merging import merge
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.adapters.record import is_patched
from rosa.commands import DTYPES, parser
from rosa.commands.adapters import ALONE, Chosen, choose
from rosa.composition.disk import WEIGHTS_NAME as COMPOSITION_NAME
from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN
from rosa.storage.output import check_output
from rosa.training.loading import end_turns
from rosa.training.methods import load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED = {
    INSTRUCTION: "in the paper's prompt (rosa.data.prompts), as the adapter was trained",
    CHAT: "by the chat template, which is in the folder",
    PLAIN: "by text that it continues, as the adapter was trained",
}


def run(argv: list[str]) -> None:
    """Run `rosa merge ...`."""
    options = parser(
        "merge",
        "Put what an adapter does into the weights of its base, and save that as an ordinary model of transformers, "
        "with its tokenizer: it is used without RoSA. RoAd's adapters merge, and nearly all of peft's; RoSA's cannot, "
        "as what they do depends on the input.",
    )
    options.add_argument("adapter", metavar="ADAPTER", help="RoAd's or peft's, a folder or Hub name")
    options.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the model; it must hold nothing yet")
    options.add_argument("--model", help="folder or Hub name of the base; default: the one that the adapter names")
    options.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the model; default: as it was saved")
    args = options.parse_args(argv)

    output = args.output.resolve()  # beside which the model is written first
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{args.output} is there already, and not an empty folder: choose another")
    check_output(output)
    _refuse_composition(Path(args.adapter))
    chosen = choose(options, args)
    _refuse_rosa(chosen)
    _refuse_prompts_of_peft(chosen)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-unfinished-") as unfinished:
        model, tokenizer = _merged(chosen, args.dtype)
        if chosen.form == CHAT:
            end_turns(model, tokenizer)
        folder = Path(unfinished) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        os.rename(folder, output)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"model  {args.output}, {size / 1e6:,.1f} MB, {str(model.dtype).removeprefix('torch.')}")
    print(f"base   {chosen.base.name}")
    print(f"asked  {ASKED[chosen.form]}")


def _merged(chosen: Chosen, dtype: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base with the adapter in its weights, on the CPU, and its tokenizer."""
    folder = chosen.folders[ALONE]
    with base_named_by([folder], chosen.model):
        tokenizer = load_tokenizer(chosen.base.name, revision=chosen.base.revision, beside=[folder])
        _refuse_quantized(chosen)
        model = load_model(chosen.base.name, dtype, revision=chosen.base.revision)
    model = load_trained(model, folder)
    return (merge(model) if is_patched(model) else _merged_by_peft(model, folder)), tokenizer


def _merged_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from rosa.training.ln_tuning import narrow_norms

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = getattr(ends[0], "weight", None) is getattr(ends[1], "weight", None)
    if shared and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            f"the adapter in {folder} adapts an embedding or an output layer, and they share one weight in its base: "
            "merged, it would change both. Leave the adapter beside its base"
        )
    narrow_norms(model)
    try:
        return model.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft has many kinds, and each its own reasons
        raise ValueError(f"peft cannot merge the adapter in {folder}: {type(error).__name__}: {error}") from error


def _refuse_composition(folder: Path) -> None:
    if (folder / COMPOSITION_NAME).is_file() and not has_adapter(folder):
        raise ValueError(
            f"{folder} holds a composition, which cannot be merged: what it does depends on the task and on where a "
            "token stands. Use it from Python, by rosa.load"
        )


def _refuse_rosa(chosen: Chosen) -> None:
    folder = chosen.folders[ALONE]
    if not is_peft(folder) and isinstance(adapter_config(chosen.descriptions[ALONE], folder), RosaConfig):
        raise ValueError(
            f"the adapter in {folder} is RoSA's, which cannot be merged: what it does to queries and keys depends on "
            "the input, so no weight does the same. Use it with RoSA (rosa chat, rosa generate, rosa.load), or train "
            "one that merges: rosa train --method road, or lora"
        )


def _refuse_prompts_of_peft(chosen: Chosen) -> None:
    folder = chosen.folders[ALONE]
    if not is_peft(folder):
        return
    import peft

    kind = chosen.descriptions[ALONE].get("peft_type")
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if config is not None and issubclass(config, peft.PromptLearningConfig):
        raise ValueError(
            f"the adapter in {folder} is peft's {kind}, which cannot be merged: it adds tokens that it has learnt, and "
            "changes no weight"
        )


def _refuse_quantized(chosen: Chosen) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(chosen.base.name, revision=chosen.base.revision or "main")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{chosen.base.name} was saved quantized, and what an adapter makes of its weights would have to be "
            "rounded to few bits anew: give the model in 16 or 32 bits that it was made from, with --model"
        )
