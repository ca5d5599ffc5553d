"""RosaConfig and RoadConfig: the paper's defaults, and every field refused by name where it does not fit."""

import pytest

from rosa import RoadConfig, RosaConfig


def test_defaults_are_the_papers():
    config = RosaConfig()
    assert (config.r_low, config.alpha, config.rank, config.train_norms) == (0.25, 0.1, 128, True)
    assert (config.layers, config.adapter_dtype) == (None, "float32")


@pytest.mark.parametrize(
    ("rotary_dim", "r_low", "pairs"), [(128, 0.25, 16), (256, 0.25, 32), (80, 0.25, 10), (64, 1.0, 32), (200, 0.29, 29)]
)
def test_low_pairs(rotary_dim, r_low, pairs):
    assert RosaConfig(r_low=r_low).low_pairs(rotary_dim) == pairs


def test_layers_are_sorted():
    assert RosaConfig(layers=[3, 1]).layers == (1, 3)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(r_low=0), ValueError, r"r_low must lie in \(0, 1\], got 0"),
        (dict(r_low=1.1), ValueError, r"r_low must lie in \(0, 1\], got 1.1"),
        (dict(r_low=float("nan")), ValueError, "r_low must lie"),
        (dict(r_low="a quarter"), TypeError, "r_low must be a number, got 'a quarter'"),
        (dict(r_low=True), TypeError, "r_low must be a number, got True"),
        (dict(alpha=float("inf")), ValueError, "alpha must be finite, .*got inf"),
        (dict(alpha=float("nan")), ValueError, "alpha must be finite, .*got nan"),
        (dict(alpha=1e39), ValueError, r"0 or 1.175e-38 to 3.403e\+38 in size, as float32 is, got 1e\+39"),
        (dict(alpha=-1e39), ValueError, r"as float32 is, got -1e\+39"),
        (dict(alpha=10**400), ValueError, "as float32 is, got 10000"),
        (dict(alpha=1e-39), ValueError, "as float32 is, got 1e-39"),
        (dict(rank=True), TypeError, "rank must be an int, got True"),
        (dict(layers=(True,)), TypeError, "layers must hold ints"),
        (dict(alpha=None), TypeError, "alpha must be a number, got None"),
        (dict(rank=0), ValueError, "rank must be at least 1, got 0"),
        (dict(rank=8.0), TypeError, "rank must be an int, got 8.0"),
        (dict(train_norms="no"), TypeError, "train_norms must be a bool, got 'no'"),
        (dict(adapter_dtype="int8"), ValueError, "adapter_dtype must be one of float32, .*, got 'int8'"),
        (dict(layers=()), ValueError, "layers is empty"),
        (dict(layers=3), TypeError, "layers must be a sequence of layer indices or None, got 3"),
        (dict(layers=(0.5,)), TypeError, "layers must hold ints"),
        (dict(layers=(1, 1)), ValueError, "layers must be distinct indices from 0"),
        (dict(layers=(-1,)), ValueError, "layers must be distinct indices from 0"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        RosaConfig(**fields)


@pytest.mark.parametrize("targets", [("v_proj", "q_proj"), ["q_proj", "v_proj", "q_proj"], {"q_proj", "v_proj"}])
def test_equal_targets_are_equal_configurations(targets):
    assert RoadConfig(targets=targets) == RoadConfig(targets=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(variant=3), ValueError, "variant must be one of 1, 2, 4, got 3"),
        (dict(variant=1.0), ValueError, "variant must be one of 1, 2, 4, got 1.0"),
        (dict(variant=True), ValueError, "variant must be one of 1, 2, 4, got True"),
        (dict(targets="q_proj"), ValueError, "or a sequence of names .* got 'q_proj'"),
        (dict(targets=3), TypeError, "or a sequence of names, got 3"),
        (dict(targets=()), ValueError, r"targets must hold names of linear layers, got \(\)"),
        (dict(pairing=3), ValueError, "an even group size from 2, got 3"),
        (dict(train_norms=1), TypeError, "train_norms must be a bool, got 1"),
    ],
)
def test_bad_fields_of_road_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        RoadConfig(**fields)


def test_r_low_that_leaves_no_pair_is_refused():
    with pytest.raises(ValueError, match=r"r_low=0.1 leaves no pair of 16 rotary elements a head.*0.125"):
        RosaConfig(r_low=0.1).low_pairs(16)
