"""Rows are checked and on disk as soon as they are added."""

import pytest

from benchmarks.results import Recorder, read

ROW = dict(group="roae", provider="fused", mode="both", shape="small", batch=2, seq=64, milliseconds=1.5)


def test_every_row_is_on_disk_when_it_is_added(tmp_path):
    recorder = Recorder(tmp_path / "folder" / "rows.json")
    for count in (1, 2):
        recorder.add({**ROW, "batch": count})
        run = read(recorder.path)
        assert [row["batch"] for row in run.rows] == list(range(1, count + 1))
    assert [path.name for path in recorder.path.parent.iterdir()] == ["rows.json"]
    assert run.rows[-1] == ROW
    assert {"device", "date", "driver", "commit", "python", "torch", "triton", "transformers"} <= run.environment.keys()


def test_the_commit_can_be_named_where_there_is_no_history(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "abc1234")
    recorder = Recorder(tmp_path / "rows.json")
    recorder.add(ROW)
    assert read(recorder.path).environment["commit"] == "abc1234"


def test_a_row_without_its_numbers_is_refused(tmp_path):
    recorder = Recorder(tmp_path / "rows.json")
    with pytest.raises(ValueError, match="lacks milliseconds"):
        recorder.add({key: value for key, value in ROW.items() if key != "milliseconds"})
    assert not recorder.path.exists()
