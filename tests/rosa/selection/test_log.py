"""Selections in a Trainer's log come back as they were, also from a log that was saved."""

import json

from rosa.selection.algorithm import Selection
from rosa.selection.log import log_entry, read_entry

LAYERS = tuple(range(12))
MADE = Selection(40, (2, 10, 11), True, tuple(layer / 8 for layer in LAYERS))


def test_a_selection_comes_back_from_a_log_that_was_saved_in_the_order_of_the_alphabet():
    entry = {**log_entry(MADE, LAYERS), "step": MADE.step}
    assert read_entry(json.loads(json.dumps(entry, sort_keys=True))) == (MADE, LAYERS) == read_entry(entry)


def test_another_entry_is_none():
    assert read_entry({"loss": 1.0, "step": 40}) is None
