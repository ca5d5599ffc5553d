"""Rows of data, each with its place, from files, from folders of files and from the hub, read as they are asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where rows come from.

    Attributes:
        data (str): a file, a folder of such files, or the name of a dataset of the hub.
        split, config, revision (str, optional): of a dataset of the hub: its split (None is "train"; "train+test" for
            two), its configuration, and a branch, tag or commit.
    """

    data: str
    split: str | None = None
    config: str | None = None
    revision: str | None = None

    def files(self) -> list[Path]:
        """The files, those of a folder by name; none for a dataset of the hub.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file of another kind, a folder without data, or a split and the like of files.
        """
        path = Path(self.data)
        if path.suffix not in _READERS and not path.exists():
            return []
        if self[1:] != (None, None, None):
            raise ValueError(
                f"{self.data} stands here, and has no split, configuration or revision: these belong to a dataset of "
                "the hub. Leave out --data_split, --data_config and --data_revision"
            )
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _READERS and file.is_file())
            if not files:
                raise ValueError(f"the folder {path} holds no {_KINDS} files")
            return files
        if path.suffix not in _READERS:
            raise ValueError(
                f"{path}: training data must be a {_KINDS} file, a folder of such files, or the name of a dataset"
            )
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        return [path]


def read_rows(source: Source, *, streaming: bool = False) -> Iterator[tuple[str, object]]:
    """The rows of a source in their order, one after the other.

    Args:
        source (Source): where they come from.
        streaming (bool): never hold all of them: a .json file is refused, and the hub is read row by row.

    Yields:
        tuple of str and object: the place, as "rows.jsonl, line 3", and what stands there.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: a file is damaged, not UTF-8 or empty, or cannot be streamed; the message names it and the place.
    """
    files = source.files()
    if not files:
        rows = dataset_rows(
            source.data, source.split or "train", config=source.config, revision=source.revision, streaming=streaming
        )
        yield from ((f"{source.data}, {place}", row) for place, row in _numbered(rows))
    for file in files:
        if streaming and file.suffix == ".json":
            raise ValueError(f"{file} is one JSON text, which is read whole: write a row a line (.jsonl) to stream it")
        for place, row in _READERS[file.suffix](file):
            yield f"{file}, {place}", row


def dataset_rows(
    name: str, split: str, *, config: str | None = None, revision: str | None = None, streaming: bool = False
) -> Iterable[dict[str, object]]:
    """The rows of a dataset of the hub, as they come.

    Args:
        name (str): for `datasets.load_dataset`.
        split (str): one of its splits; "train+test" for two.
        config (str, optional): the configuration, of a dataset that has several.
        revision (str, optional): branch, tag or commit; None is "main".
        streaming (bool): read them from the hub row by row, and keep none.

    Returns:
        iterable of dict: a row each.

    Raises:
        FileNotFoundError: there is no such dataset, or it cannot be reached.
    """
    from datasets import load_dataset

    how = {"streaming": True} if streaming else {}
    try:
        return load_dataset(name, config, split=split, revision=revision, **how)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{name} is neither a file here nor a dataset that can be reached: {error}") from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}" if not path.exists() else f"{path} is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def kind(value: object) -> str:
    """What a JSON value is, and, if it is short, the value."""
    name = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    text = json.dumps(value, default=str)
    return name.get(type(value), "a number") + (f" {text}" if value is not None and len(text) <= 40 else "")


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    rows = _parse(read_text(path), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects, got {kind(rows)}")
    return _numbered(rows)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    empty = True
    # In bytes, which only b"\n" divides: a JSON string may hold U+2028 and other separators as they are.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 text: line {number}, byte {error.start}: {error.reason}"
                ) from error
            if text.strip():
                empty = False
                yield f"line {number}", _parse(text, str(path), first_line=number)
    if empty:
        raise ValueError(f"{path} is empty")


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    """By Python's reader, which leaves every value the text that it is; others would make numbers of answers."""
    csv.field_size_limit(2**31 - 1)  # of characters, 131,072 at first: a document may have more
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            if not rows.fieldnames:
                raise ValueError(f"{path} is empty")
            for number, row in enumerate(rows):
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, row {number}: must have {len(rows.fieldnames)} fields, as its header has"
                    )
                yield f"row {number}", row
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV: line {rows.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text after line {rows.line_num}: {error.reason}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        yield from _numbered(row for batch in batches for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {error}") from error


def _numbered(rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((f"row {index}", row) for index, row in enumerate(rows))


def _parse(text: str, path: str, first_line: int = 1) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path} is not valid JSON: line {line}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path} holds lists or objects that are nested too deeply to be read") from error


_READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
_KINDS = ", ".join([*_READERS][:-1]) + f" or {[*_READERS][-1]}"
