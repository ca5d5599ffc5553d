"""The model card that is saved with an adapter: what it is, what it was made for, how to load it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

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

TEXT = """---
{metadata}
---
{mark}

# {paper.title} adapter for {title}

An adapter of {parameters:,} parameters, {norms:,} of them norm weights, trained with {paper.title}
({paper.meaning}, [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})).

## Load it

```python
import rosa
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
rosa.load_adapter(model, "path/to/this/folder")
```

The name of this repository on the hub, `user/name`, stands as well as the path of this folder.

## Configuration

| field | value |
| --- | --- |
{configuration}

| base model | |
| --- | --- |
{shape}
"""


def model_card(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The text of README.md, with the metadata that the hub reads.

    Args:
        description (dict): as it stands in `rosa_config.json`.
        tensors (dict of Tensor): the adapter's, by name.
    """
    base, method = description["base_model_name_or_path"], description["method"]
    on_hub = base is not None and _names_a_repository(base)
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="rosa",
        tags=[*dict.fromkeys(["rosa", method]), "adapter", description["base"]["model_type"]],
    )
    return TEXT.format(
        metadata=metadata.to_yaml(),
        mark=MARK,
        paper=PAPERS[method],
        title=base if on_hub else f"a {description['base']['model_type']} model",
        # By their names: modules of ours have no `weight`, and RoAd's angles are as flat as a norm.
        parameters=sum(t.numel() for t in tensors.values()),
        norms=sum(t.numel() for name, t in tensors.items() if name.endswith(".weight")),
        base=base if on_hub else "path/to/the/base/model",
        configuration=_rows(description["config"]),
        shape=_rows(description["base"]),
    )


def _names_a_repository(name: str) -> bool:
    if os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _rows(fields: dict[str, Any]) -> str:
    return "\n".join(f"| `{name}` | {value} |" for name, value in fields.items())
