"""Rows of instruction data, read and checked."""

from __future__ import annotations

from rosa.data.files import Source, read_rows
from rosa.data.forms import check_instruction


def load_rows(data: str, split: str | None = None, *, target: str | None = "output") -> list[dict]:
    """Read instruction data and check every row.

    Args:
        data (str): a .json file (a list of objects), a .jsonl file (one object a line), a .csv or .parquet file, a
            folder of such files, or the name of a dataset for `datasets.load_dataset`. A row has the strings
            `instruction` and `output`, and may have `input`.
        split (str, optional): the split of a named dataset, None for "train"; files have none.
        target (str, optional): the field to find beside `instruction`; "answer" for the rows of a test, None for rows
            that wait for an answer.

    Returns:
        list of dict: the rows as they came, with `input` set to "" where it was absent or null.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: the data holds no rows, is not in this form, or a field is missing or not a string; the message
            names the place.
    """
    rows = [check_instruction(row, place, target) for place, row in read_rows(Source(data, split))]
    if not rows:
        raise ValueError(f"{data} holds no rows")
    return rows
