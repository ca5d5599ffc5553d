"""What a task is: its name, the form of its answers, and where the hub has its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FORMS = ("number", "letter", "text")


@dataclass(frozen=True)
class HubData:
    """The original data set of a benchmark on the Hugging Face hub.

    Args:
        name (str): of the data set, or a folder that `datasets.load_dataset` reads.
        split (str): the split that the paper tests on; "train+test" for two.
        rows (int): how many rows the paper's test set has; another number is an error.
        convert (callable): a row of the data set to `instruction` and `answer` in LLM-Adapters' wording.
        config (str, optional): the configuration of the data set.
        revision (str, optional): a branch; the hub's own Parquet conversion for data sets that are a script at heart,
            which `datasets` runs no more.
    """

    name: str
    split: str
    rows: int
    convert: Callable[[dict], dict]
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark, or a task of the user's own.

    Args:
        name (str): also of its folder, `DATA_DIR/NAME/test.json`.
        answer (tuple of str, or str): the form of its answers: the options to choose from, "number", "letter" (A to E)
            or "text".
        hub (HubData, optional): where the rows are without a folder.
    """

    name: str
    answer: tuple[str, ...] | str
    hub: HubData | None = None
