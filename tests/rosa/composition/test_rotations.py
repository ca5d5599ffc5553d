"""Products, powers and ways between RoAd_1 adapters, against the matrices that they stand for."""

import pytest
import torch

from rosa.composition import rotations
from rosa.composition.rotations import Rotations
from rosa_kernels.road_reference import road_reference


def make(seed):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(6, generator=generator, dtype=torch.float64)
    return Rotations(theta, torch.rand(6, generator=generator, dtype=torch.float64) + 0.5)


def matrix(adapter):
    """The matrix, `[12, 12]`, by which the adapter multiplies a hidden state."""
    return road_reference(torch.eye(12, dtype=torch.float64), *adapter, variant=1).T


def test_the_product_is_the_product_of_the_matrices_in_any_order():
    one, other, third = map(make, range(3))
    expected = matrix(one) @ matrix(other) @ matrix(third)
    torch.testing.assert_close(matrix(rotations.product(one, other, third)), expected)
    torch.testing.assert_close(matrix(rotations.product(third, one, other)), expected)
    assert rotations.product(one) == one


def test_scaled_is_the_matrix_times_a_factor():
    torch.testing.assert_close(matrix(rotations.scaled(make(0), -2.5)), -2.5 * matrix(make(0)))


@pytest.mark.parametrize("s", [-1, 0, 1, 2, 3])
def test_whole_powers_are_powers_of_the_matrix(s):
    torch.testing.assert_close(matrix(rotations.power(make(0), s)), torch.linalg.matrix_power(matrix(make(0)), s))


def test_two_halves_of_the_way_are_the_whole():
    half = matrix(rotations.power(make(0), 0.5))
    torch.testing.assert_close(half @ half, matrix(make(0)))


def test_interpolation_begins_with_one_ends_with_the_other_and_goes_evenly():
    one, other = make(0), make(1)
    torch.testing.assert_close(matrix(rotations.interpolate(one, other, 0)), matrix(one))
    torch.testing.assert_close(matrix(rotations.interpolate(one, other, 1)), matrix(other))
    step = matrix(rotations.interpolate(one, other, 0.25)) @ torch.linalg.inv(matrix(one))
    torch.testing.assert_close(torch.linalg.matrix_power(step, 4) @ matrix(one), matrix(other))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_have_no_powers_are_refused(scale):
    adapter = make(0)
    adapter.alpha[3] = scale
    for call in (
        lambda: rotations.power(adapter, 0.5),
        lambda: rotations.interpolate(adapter, make(1), 0.5),
        lambda: rotations.interpolate(make(1), adapter, 0.5),
    ):
        with pytest.raises(ValueError, match=f"scales must be above 0 to have powers, the least is {scale:g}"):
            call()
