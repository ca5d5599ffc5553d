"""The counted cost of different adapters in one batch, beside peft's in the same run."""

import pytest

from benchmarks.mixed_batch import ADAPTERS, METHODS, launches
from benchmarks.results import MIXED, read


@pytest.fixture(scope="module")
def counts():
    """Launches by method and number of adapters, with the kernels as launches; in the interpreter without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSA_BACKEND", "triton")
        return {name: {n: launches(name, n) for n in ADAPTERS} for name in METHODS}


@pytest.mark.parametrize("method", ["base", "RoAd", "RoSA", "LoRA by torch.bmm"])
def test_eight_adapters_launch_what_one_does(counts, method):
    assert counts[method][8] == counts[method][1]


def test_ours_launch_less_than_peft_and_than_plain_products(counts):
    for method in ("RoAd", "RoSA"):
        assert counts[method][8] <= counts["base"][8] < counts["LoRA by torch.bmm"][8] < counts["LoRA (peft)"][8] / 2
    assert counts["LoRA (peft)"][8] < counts["RoAd (peft)"][8]


def test_the_rows_that_are_kept_are_of_all_methods():
    rows = read(MIXED).rows
    assert {(row["provider"], row["adapters"]) for row in rows} == {(name, n) for name in METHODS for n in ADAPTERS}
