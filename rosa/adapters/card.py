"""The model card that is saved with an adapter: what it is, what it was made for, how to load it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from rosa.adapters.base import NAME

MARK = "<!-- Written by RoSA, which writes it anew when it saves here. Take this line out to keep your own text. -->"


class Paper(NamedTuple):
    """A kind of adapter as its paper calls it, what the name stands for, and the paper's number at arXiv."""

    title: str
    meaning: str
    arxiv: str


PAPERS = {
    "rosa": Paper("RoSA", "RoPE-aware Selective Adaptation", "2511.21733"),
    "road": Paper("RoAd", "2D rotary adaptation", "2409.00119"),
}

HERE, BASE = "path/to/this/folder", "path/to/the/base/model"  # where a name on the hub is not known

TEXT = """---
{metadata}
---
{mark}

# {title} adapter for {base}

{about}

## Use it

```python
import rosa

model, tokenizer = rosa.load({load})
{into}```

or, in a terminal, `rosa chat --adapter {chat}`. The name of a repository on the hub, `user/name`, stands as well as the
path of a folder.
{run}
## Configuration

{configuration}
"""


def model_card(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    source: str = HERE,
    figures: Mapping[str, str] | None = None,
) -> str:
    """The text of README.md, with the metadata that the hub reads.

    Args:
        description (mapping): as it stands in `rosa_config.json`, or in peft's `adapter_config.json`.
        tensors (mapping of Tensor): the adapter's, by name.
        source (str): what to load it by.
        figures (mapping, optional): of the run that trained it, by what they are.
    """
    base, of_peft = description.get(NAME), "peft_type" in description
    on_hub = bool(base) and _names_a_repository(base)
    title = description["peft_type"] if of_peft else PAPERS[_method(description)].title
    shape = None if of_peft else description["base"]
    kind = [title.lower()] if of_peft else ["rosa", _method(description)]
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft" if of_peft else "rosa",
        tags=[*dict.fromkeys(kind), "adapter", *([shape["model_type"]] if shape else [])],
    )
    tables = [_table("field", "value", _peft_fields(description) if of_peft else description["config"])]
    return TEXT.format(
        metadata=metadata.to_yaml(),
        mark=MARK,
        title=title,
        base=base if on_hub else f"a {shape['model_type']} model" if shape else "a model",
        about=_about(description, tensors),
        load=f'"{source}"' if on_hub else f'"{source}", base="{BASE}"',
        into="" if of_peft else f'# or, into a model of the base that you have: rosa.load_adapter(model, "{source}")\n',
        chat=source if on_hub else f"{source} --model {BASE}",
        run=f"\n## The run\n\n{_table('figure', 'value', figures, code=False)}\n" if figures else "",
        configuration="\n\n".join(tables + ([_table("base model", "", shape)] if shape else [])),
    )


def _about(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """How many parameters there are, and by what method they were trained."""
    number = f"{sum(t.numel() for t in tensors.values()):,}"
    if "peft_type" in description:
        type_ = description["peft_type"]
        return f"An adapter of {number} parameters, [peft](https://github.com/huggingface/peft)'s of type {type_}."
    paper = PAPERS[_method(description)]
    # By their names: modules of ours have no `weight`, and RoAd's angles are as flat as a norm.
    norms = sum(t.numel() for name, t in tensors.items() if name.endswith(".weight"))
    return (
        f"An adapter of {number} parameters, {norms:,} of them norm weights, trained with {paper.title}\n"
        f"({paper.meaning}, [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))."
    )


def _method(description: Mapping[str, Any]) -> str:
    return description.get("method", "rosa")  # what had none when there was one


def _peft_fields(description: Mapping[str, Any]) -> dict[str, Any]:
    """Those of peft's configuration that say something."""
    said_above = {NAME, "peft_type", "auto_mapping", "inference_mode"}
    fields = {name: value for name, value in description.items() if name not in said_above}
    return {name: value for name, value in fields.items() if value not in (None, False, {}, [], "")}


def _names_a_repository(name: str) -> bool:
    if os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _table(first: str, second: str, fields: Mapping[str, Any], *, code: bool = True) -> str:
    rows = [f"| `{name}` | {value} |" if code else f"| {name} | {value} |" for name, value in fields.items()]
    return "\n".join([f"| {first} | {second} |", "| --- | --- |", *rows])
