"""Files that are whole or not there, and folders with one process at a time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rosa.storage.files import replace_files, replace_text
from rosa.storage.locking import alone_in

ROOT = Path(__file__).parents[3]


def test_a_file_takes_its_place_whole_and_leaves_nothing_beside_it(tmp_path):
    replace_text(tmp_path / "a", "old")
    replace_files({tmp_path / "a": b"new", tmp_path / "b": b"other"})
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "b").read_text() == "other"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    plain = tmp_path / "plain"
    plain.write_text("")
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_links_are_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "a.tmp", ".a.tmp"):
        (folder / name).symlink_to(victim)
    replace_text(folder / "a", "new")
    assert victim.read_text() == "mine"
    assert (folder / "a").read_text() == "new" and not (folder / "a").is_symlink()


def test_after_an_error_the_old_files_are_whole_and_no_other_is_there(tmp_path):
    replace_text(tmp_path / "a", "old")
    with pytest.raises(OSError):
        replace_files({tmp_path / "a": b"new", tmp_path / "no folder" / "b": b"other"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_what_a_killed_process_left_goes_once_nobody_can_be_writing_it(tmp_path):
    left, young = tmp_path / ".a.0123.tmp", tmp_path / ".a.4567.tmp"
    left.write_text("half"), young.write_text("half")
    os.utime(left, (time.time() - 7200,) * 2)
    replace_text(tmp_path / "a", "new")
    assert not left.exists() and young.exists()


def test_a_folder_belongs_to_one_process_until_it_ends_or_is_killed(tmp_path):
    holder = f"""
import sys, time
from pathlib import Path
from rosa.storage.locking import alone_in
with alone_in(Path({str(tmp_path)!r})):
    print("in", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    try:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="another process is at work in"), alone_in(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with alone_in(tmp_path / "elsewhere"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):  # and again
        pass
