"""What logits of the response alone save, counted; and the real rows that it is counted for."""

import pytest

from benchmarks.paper import ROOT
from benchmarks.presets import PRESETS
from benchmarks.response_logits import LENGTHS, ROWS, Cost, Lengths, cost, rows
from benchmarks.results import RESPONSE_LOGITS, read
from rosa.data.prompts import prompt
from rosa.data.rows import load_rows

DATA = ROOT.parent / "shared" / "data"
FILES = {
    "Commonsense15K": [f"benchmarks/{n}/train.json" for n in ("boolq", "ARC-Challenge", "ARC-Easy", "openbookqa")],
    "Math10K": ["training/math_data.json"],
}


def test_the_rows_that_are_kept_are_those_that_are_counted(monkeypatch):
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    assert read(RESPONSE_LOGITS).rows == rows()


def test_logits_are_saved_at_every_other_position_and_the_arithmetic_of_the_output_layer_with_them(monkeypatch):
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    config, lengths = PRESETS["tiny"], Lengths(1, 80, 12)
    before, after = (cost("tiny", lengths, alone=alone) for alone in (False, True))
    everything, labelled = ROWS * sum(lengths.tokens), ROWS * lengths.tokens[1] + 1
    saved = everything - labelled
    # A product forward and one backward, and 12 bytes a logit that live at a time.
    arithmetic = 4 * saved * config.hidden_size * config.vocab_size
    assert before.flops - after.flops == arithmetic
    assert Cost(0, before.logits_bytes - after.logits_bytes) == Cost(0, 12 * saved * config.vocab_size)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not at ../shared/data")
@pytest.mark.parametrize("name", LENGTHS)
def test_the_lengths_are_those_of_the_real_rows(name):
    real = [row for file in FILES[name] for row in load_rows(str(DATA / file))]
    prompts = sum(len(prompt(row["instruction"], row["input"])) for row in real)
    responses = sum(len(row["output"]) for row in real)
    assert LENGTHS[name] == Lengths(len(real), round(prompts / len(real)), round(responses / len(real)))
