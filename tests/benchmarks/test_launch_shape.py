"""The sweep over the constants of `roae`'s launches changes what it says, and leaves nothing changed."""

import pytest

from benchmarks.bench_launch_shape import AS_IT_IS, CHANGES, CONSTANTS, changed
from rosa_kernels import roae_triton
from rosa_kernels.shapes import SHAPES, launches

TOKENS = ((1, 1), (2, 230), (2, 2048), (1, 16384))


def launched(batch, seq):
    """Of each of `roae`'s launches what the constants may change: programs, warps, numbers, and the kernel's shape."""
    found = []
    for launch in list(launches(SHAPES[0], batch, seq))[:3]:
        numbers = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
        found.append((launch.programs, launch.num_warps, numbers, [of.value for of in launch.arguments["shape"]]))
    return found


def all_launched():
    return [launched(*tokens) for tokens in TOKENS]


@pytest.mark.parametrize("provider", CHANGES)
def test_every_row_changes_a_launch_and_only_while_it_is_measured(provider):
    name, value = CHANGES[provider]
    before, as_it_is = all_launched(), getattr(roae_triton, name)
    with changed(provider):
        assert getattr(roae_triton, name) == value
        assert all_launched() != before
    assert getattr(roae_triton, name) == as_it_is and all_launched() == before


def test_every_constant_stands_beside_its_present_value():
    for name, values in CONSTANTS.items():
        assert getattr(roae_triton, name) in values, f"the sweep lacks {name} as it is"
    assert [name for name, _ in CHANGES.values()] == [name for name, values in CONSTANTS.items() for _ in values[1:]]


@pytest.mark.parametrize("provider", [AS_IT_IS, "separate"])
def test_the_other_rows_change_nothing(provider):
    before = all_launched()
    with changed(provider):
        assert all_launched() == before


def test_eight_warps_do_64_tokens_each():
    """As wgmma of an H100 wants them."""
    with changed("NUM_WARPS = 8"):
        forward, _, backward = launched(2, 2048)
        for _, warps, _, shape in (forward, backward):
            assert warps == 8 and shape[roae_triton.Shape._fields.index("BLOCK_T")] == 64


def test_with_one_key_program_no_eq_3_is_divided():
    with changed("KEY_PROGRAMS = 1"):
        assert all(launched(*tokens)[0][2]["key_parts"] == 1 for tokens in TOKENS)
