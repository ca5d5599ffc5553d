"""Files, folders and datasets of the hub, row by row, and what is said of those that cannot be read."""

import json

import pytest
from datasets import Dataset

from rosa.data.files import Source, read_rows

ROWS = [{"text": "one"}, {"text": "two, or\nthree"}]


def write(folder, name, rows=ROWS):
    file = folder / name
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    elif file.suffix == ".csv":
        Dataset.from_list(rows).to_csv(str(file), index=False)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        file.write_text(json.dumps(rows))
    return file


def read(data, *options, **how):
    return list(read_rows(Source(str(data), *options), **how))


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.json", ["row 0", "row 1"]),
        ("a.jsonl", ["line 1", "line 2"]),
        ("a.csv", ["row 0", "row 1"]),
        ("a.parquet", ["row 0", "row 1"]),
    ],
)
def test_a_file_gives_its_rows_with_their_places(tmp_path, name, places):
    file = write(tmp_path, name)
    assert read(file) == [(f"{file}, {place}", row) for place, row in zip(places, ROWS, strict=True)]


def test_a_folder_gives_the_rows_of_its_files_by_name(tmp_path):
    for name in ("c.csv", "a.parquet", "b.json"):
        write(tmp_path, name, [{"text": name}])
    (tmp_path / "README.md").write_text("no data")
    assert [row["text"] for _, row in read(tmp_path)] == ["a.parquet", "b.json", "c.csv"]


def test_messages_come_out_of_parquet_as_they_were(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    assert [row for _, row in read(write(tmp_path, "a.parquet", rows))] == rows


def test_a_number_in_csv_is_the_text_that_it_is(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffinstruction,output\nadd,007\nadd,NA\nadd,\n")
    assert [row["output"] for _, row in read(tmp_path / "a.csv")] == ["007", "NA", ""]


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    for name in ("a.csv", "b.jsonl"):
        file = write(tmp_path, name, [{"text": "good"}] * 20_000)
        with open(file, "ab") as opened:
            opened.write(b"\n\xff\xff\n")  # beyond what is read ahead
        assert next(read_rows(Source(str(file))))[1] == {"text": "good"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"x,y\n1\n", "row 0: must have 2 fields, as its header has"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", "row 1: must have 2 fields"),
        ("a.csv", b'x,y\n1,2\n1,"2" 3\n', "is no CSV: line 2"),
        ("a.csv", b"x,y\n1,2\n1,\xff\n", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "is not UTF-8 text: line 2, byte 10"),
        ("a.parquet", b"nonsense", "is damaged or no Parquet file"),
        ("a.parquet", b"", "is damaged or no Parquet file"),
        ("a.xlsx", b"", "must be a .json, .jsonl, .csv or .parquet file, a folder of such files"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read(tmp_path / name)


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.json, \.jsonl, \.csv or \.parquet files"):
        read(tmp_path)


@pytest.mark.parametrize("options", [("test",), (None, "main"), (None, None, "abc")])
def test_a_file_has_no_split_configuration_or_revision(tmp_path, options):
    with pytest.raises(ValueError, match="stands here, and has no split.*Leave out --data_split, --data_config and"):
        read(write(tmp_path, "a.json"), *options)


def test_a_json_file_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json is one JSON text.*\(\.jsonl\) to stream it"):
        read(write(tmp_path, "a.json"), streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_is_asked_for_as_the_options_say(monkeypatch, streaming):
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load)
    found = read("someone/data", "test", "main", "abc", streaming=streaming)
    assert found == [(f"someone/data, row {number}", row) for number, row in enumerate(ROWS)]
    more = {"streaming": True} if streaming else {}
    assert asked == [(("someone/data", "main"), {"split": "test", "revision": "abc", **more})]
