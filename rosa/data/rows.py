"""Rows of data, read and checked: of instructions alone, or of any form that can be learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from rosa.data.files import Source, read_rows
from rosa.data.forms import Form, check_instruction, check_row, find_form


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


def read_learnable(
    source: Source, form: str | None = None, *, streaming: bool = False
) -> tuple[Form, Iterator[tuple[dict, str]]]:
    """Find out the form of rows, and read and check them one by one, each with its place.

    Args:
        source (Source): where they stand.
        form (str, optional): one of `forms.DATA_FORMS`; None goes by the columns of the first row.
        streaming (bool): as for `files.read_rows`.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: the data holds no rows, or is of none of the forms or of several; the message names the place.
    """
    found = read_rows(source, streaming=streaming)
    first = next(found, None)
    if first is None:
        raise ValueError(f"{source.data} holds no rows")
    its_form = find_form(first[1], first[0], form)
    return its_form, ((check_row(its_form, value, place), place) for place, value in chain([first], found))


def load_learnable(
    data: str, *, form: str | None = None, limit: int | None = None
) -> tuple[Form, list[dict], list[str]]:
    """Read rows of one of the forms that `rosa train` takes, and check every one.

    Args:
        data (str): as for `load_rows`.
        form (str, optional): as for `read_learnable`.
        limit (int, optional): read no more rows than these.

    Returns:
        tuple: their form; the rows as `forms.Form.prompts` has them; the place of each.

    Raises:
        FileNotFoundError, ValueError: as `read_learnable`.
    """
    its_form, found = read_learnable(Source(data), form)
    rows = list(islice(found, limit))
    return its_form, [row for row, _ in rows], [place for _, place in rows]
