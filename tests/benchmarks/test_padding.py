"""docs/paper.md says of padding what the program counts, from lengths that `rosa train` would see."""

import json

import pytest

from benchmarks import padding
from benchmarks.document import fill
from rosa.data.rows import load_rows
from rosa.data.tokens import tokenize
from tests.rosa.tiny_qwen2 import tiny_tokenizer

DATA = padding.ROOT.parent / "shared" / "data"


def test_the_document_has_the_table_that_the_program_makes():
    text = padding.DOCUMENT.read_text(encoding="utf-8")
    assert text == fill(text, {"padding": padding.table(padding.read_kept())}), "run `python -m benchmarks.padding`"


def test_the_lengths_that_are_kept_are_those_of_the_rows(tmp_path, monkeypatch):
    rows = [{"instruction": f"Add {'one and ' * (i % 3)}{i}.", "output": str(i)} for i in range(9)]
    tokenizer = tiny_tokenizer(row["instruction"] for row in rows)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for file in (file for files in padding.FILES.values() for file in files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(rows))
    monkeypatch.setattr(padding, "KEPT", tmp_path / "kept" / "lengths.csv")
    padding.save(str(tmp_path / "tokenizer"), str(tmp_path))
    examples = tokenize(load_rows(str(tmp_path / padding.FILES[padding.MATH][0])), tokenizer)
    expected = sorted(map(len, examples["input_ids"]))
    assert padding.read_kept() == {padding.COMMONSENSE: sorted(expected * 4), padding.MATH: expected}


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not at ../shared/data")
def test_all_rows_of_the_real_data_are_counted():
    for name, files in padding.FILES.items():
        assert len(padding.read_kept()[name]) == sum(len(load_rows(str(DATA / file))) for file in files)


def test_grouping_leaves_less_of_it():
    kept = padding.read_kept()
    for regime in padding.regimes():
        lengths = kept[regime.data]
        assert padding.grouped(lengths, regime) < 0.05 < 0.1 < padding.at_random(lengths, regime)
